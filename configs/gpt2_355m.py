"""GPT-2 355M (Radford et al. 2019): 24 layers of width 1,024, 354,823,168 parameters; settings in
gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt2_355m.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Sized for one node of eight 80 GB GPUs; on fewer
devices raise --optim.accumulate. Not yet trained to its end by us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt2


def pretrain() -> TrainConfig:
    return gpt2("355m")
