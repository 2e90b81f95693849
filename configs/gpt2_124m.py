"""GPT-2 124M (Radford et al. 2019): 12 layers of width 768, 124,439,808 parameters; settings in
gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt2_124m.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Sized for one node of eight 80 GB GPUs; on fewer
devices raise --optim.accumulate. Not yet trained to its end by us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt2


def pretrain() -> TrainConfig:
    return gpt2("124m")
