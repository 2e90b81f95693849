"""GPT-3 125M (Brown et al. 2020, table 2.1): 12 layers of width 768; settings in gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt3_125m.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. One copy a device. Not yet trained to its end by
us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt3


def pretrain() -> TrainConfig:
    return gpt3("125m")
