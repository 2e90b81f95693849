"""GPT-2 1.5B (XL) (Radford et al. 2019): 48 layers of width 1,600, 1,557,611,200 parameters; settings in
gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt2_1p5b.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Parameters and optimizer state are sharded over
eight devices. Not yet trained to its end by us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt2


def pretrain() -> TrainConfig:
    return gpt2("1p5b")
