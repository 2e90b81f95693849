"""The files beside a config.json that say how an image becomes pixels, and how its places stand in a text.

Read on an import and written on an export, so that the processor of transformers gives the pixels that gptjax gives, up
to the way in which each resizes; and the same ids, where that processor can.
"""

import dataclasses
import math
from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.foreign import ForeignConfig, read_json
from gptjax.interop.image_architectures import OWN, image_id
from gptjax.tokenizer import Tokenizer

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"  # the tokens of Idefics3's processor
HALF = [0.5, 0.5, 0.5]
# What OpenAI's CLIP was trained with.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BICUBIC = 3  # as Pillow numbers them


def with_processor(cfg: ModelConfig, settings: ForeignConfig) -> ModelConfig:
    """The settings with those of the image processor beside a config.json; without a file, with its class's own.

    Raises InputError for a processor, or a step of one, that has no counterpart.
    """
    if not cfg.vision.patch:
        return cfg
    folder = settings.path.parent
    path = next((folder / name for name in (PREPROCESSOR, PROCESSOR) if (folder / name).is_file()), None)
    s = ForeignConfig(path or folder / PREPROCESSOR, read_json(path) if path else {})
    s = s.inner("image_processor") if path and path.name == PROCESSOR else s
    kind, clip = s.values.get("image_processor_type", s.values.get("feature_extractor_type")), cfg.vision.class_token
    default = "CLIP" if clip else "Idefics3" if cfg.vision.projector == "linear" else "Siglip"
    name = str(kind or default).removesuffix("Fast").removesuffix("Pil")
    name = name.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in FITS:
        raise s.error("image_processor_type", kind, " or ".join(f"'{n}ImageProcessor'" for n in FITS))
    for step in ("do_resize", "do_rescale", "do_normalize"):
        s.only(step, True, None)
    if not math.isclose(s.number("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise s.error("rescale_factor", s.values["rescale_factor"], "1/255")
    side = cfg.vision.side + cfg.vision.margin
    fit = FITS[name](s, side)
    more: dict[str, Any] = {} if OWN in settings.values else {"fit": fit}
    for ours, theirs, usual in (("mean", "image_mean", CLIP_MEAN), ("std", "image_std", CLIP_STD)):
        value = s.values.get(theirs, usual if name in ("CLIP", "Llava") else HALF)
        value = value if isinstance(value, list) else [value] * 3
        if len(value) != 3 or any(type(x) not in (int, float) for x in value):
            raise s.error(theirs, value, "three numbers")
        more[ours] = tuple(map(float, value))
    return dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, **more))


def _of_idefics3(s: ForeignConfig, side: int) -> str:
    """Its images are stretched; the tiles of a large one, which it may put before it, are left out."""
    longest = s.inner("max_image_size", {"longest_edge": 364 if s.values else side}).values.get("longest_edge")
    if longest != side:
        raise s.error("max_image_size", longest, f"the encoder's image_size={side} as longest_edge")
    return "stretch"


def _of_clip(s: ForeignConfig, side: int) -> str:
    s.only("do_pad", False, None)
    cut, size = s.only("do_center_crop", True, False), s.values.get("size", {"shortest_edge": side})
    size = {"shortest_edge" if cut else "height": size, "width": size} if isinstance(size, int) else size
    square, both = {"height": side, "width": side}, size if isinstance(size, dict) else {}
    if not cut and both == square:
        return "stretch"
    crop = s.values.get("crop_size", square)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if not cut or both.get("shortest_edge") != side or crop != square:
        raise s.error("size", size, f"shortest_edge={side} and a crop_size of as much, the encoder's image_size")
    return "crop"


def _of_siglip(s: ForeignConfig, side: int) -> str:
    size, square = s.values.get("size", {"height": side, "width": side}), {"height": side, "width": side}
    if size not in (square, side):
        raise s.error("size", size, f"a height and a width of {side}, the encoder's image_size")
    return "stretch"


# How an image becomes a square, by the class of its processor.
FITS = {"Idefics3": _of_idefics3, "SmolVLM": _of_idefics3, "CLIP": _of_clip, "Llava": _of_clip, "Siglip": _of_siglip}


def with_marks(cfg: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The settings with the ids that Idefics3's processor puts around a whole image, where the tokenizer has them."""
    if tokenizer is None or not cfg.vision.patch or AROUND not in tokenizer.specials:
        return cfg
    around, whole = tokenizer.specials[AROUND], tokenizer.specials.get(WHOLE)
    begin = (around, *(tokenizer.encode(WHOLE) if whole is None else (whole,)))
    return dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, begin=begin, end=(around,)))


def with_image_id(cfg: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The settings with the id of the tokenizer's own `IMAGE`, where they name none and it has one."""
    if tokenizer is None or not cfg.vision.patch or cfg.vision.image_id >= 0 or IMAGE not in tokenizer.specials:
        return cfg
    return dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, image_id=tokenizer.specials[IMAGE]))


def image_tokens_of(cfg: ModelConfig, vocab_size: int, tokenizer: Tokenizer) -> dict[str, int]:
    """The token of images that a written tokenizer has beside those of ours: its name and id."""
    free = cfg.vision.patch > 0 and image_id(cfg, vocab_size) not in tokenizer.specials.values()
    return {IMAGE: image_id(cfg, vocab_size)} if free else {}


def written_processor(cfg: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    """The files of a processor by name: always that of images; of texts too where its ids would be ours."""
    v = cfg.vision
    side, idefics3 = v.side + v.margin, v.projector == "linear"
    values = {"do_convert_rgb": True, "do_resize": True, "resample": BICUBIC, "do_rescale": True,
              "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(v.mean), "image_std": list(v.std),
              "processor_class": "Idefics3Processor" if idefics3 else "LlavaProcessor"}  # fmt: skip
    if idefics3:
        edges = {"size": {"longest_edge": side}, "max_image_size": {"longest_edge": side}}
        values |= edges | {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": False}
    elif v.fit == "crop":
        crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
        values |= crop | {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
    else:
        values |= {"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}
    files = {PREPROCESSOR: values}
    if tokenizer is None or not _writes_ids(cfg, tokenizer):
        return files
    own = {"image_seq_len": v.num_tokens} if idefics3 else {
        "patch_size": v.patch, "image_token": IMAGE, "num_additional_image_tokens": int(v.class_token),
        "vision_feature_select_strategy": "default" if v.class_token else "full",
    }  # fmt: skip
    return files | {PROCESSOR: {"processor_class": values["processor_class"]} | own}


def _writes_ids(cfg: ModelConfig, tokenizer: Tokenizer) -> bool:
    """True where the processor of transformers puts around an image what the model has there."""
    if cfg.vision.projector != "linear":
        return not cfg.vision.begin and not cfg.vision.end
    return AROUND in tokenizer.specials and with_marks(cfg, tokenizer) == cfg


def said_of_images(cfg: ModelConfig, tokenizer: Tokenizer | None) -> str:
    """A line of an export where the written processor does other than gptjax; empty where it does the same."""
    if not cfg.vision.patch:
        return ""
    files, said = written_processor(cfg, tokenizer), []
    stretches = files[PREPROCESSOR]["image_processor_type"] != "CLIPImageProcessor"
    if cfg.vision.fit == "pad" or (stretches and cfg.vision.fit == "crop"):
        how = "fill images up to squares with white" if cfg.vision.fit == "pad" else "cut squares out of images"
        said.append(f"its processor stretches, so {how} first")
    if tokenizer is not None and PROCESSOR not in files:
        around = f"{cfg.vision.num_tokens} of {IMAGE}, between {list(cfg.vision.begin)} and {list(cfg.vision.end)}"
        said.append(f"no processor of transformers writes an image's ids as this model has them: {around}")
    return "".join(f"; {line}" for line in said)
