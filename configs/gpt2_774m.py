"""GPT-2 774M (Radford et al. 2019): 36 layers of width 1,280, 774,030,080 parameters; settings in
gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt2_774m.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Parameters and optimizer state are sharded over
eight devices. Not yet trained to its end by us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt2


def pretrain() -> TrainConfig:
    return gpt2("774m")
