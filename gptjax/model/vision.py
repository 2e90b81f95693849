"""Images as tokens: patches through an encoder of the decoder's own block, merged and brought to its width.

An image is a square of P patches (ViT, Dosovitskiy et al. 2021). Its encoder is SigLIP's shape (Zhai et al. 2023):
every patch sees all others. Squares of patches become one token (pixel shuffle, as in Idefics3, Laurencon et al. 2024),
and a projector brings it to the decoder's width (LLaVA, Liu et al. 2023). Without an encoder a token is its pixels
times one matrix (Fuyu, Bavishi et al. 2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.model.block import Params, block, layer_params, norm, one_layer, remat
from gptjax.ops.linear import linear
from gptjax.ops.reference import AttentionMask
from gptjax.parallel.sharding import constrain


class Images(NamedTuple):
    """The images of rows as a batch holds them."""

    patches_BIPY: jax.Array
    """uint8: of each of a row's I images P patches in raster order, of patch x patch x (red, green, blue) each."""
    index_BL: jax.Array
    """The image token that stands at a place, of the row's I x T; -1 where it is text."""
    last_BL: jax.Array
    """The place up to which a place sees: its own, or that of its image's last token."""


class ImageTokens(NamedTuple):
    """The tokens of images in the decoder's stream."""

    x_BLD: jax.Array
    """The token of an image at its place; anything where there is text."""
    here_BL: jax.Array
    """True where the token of an image stands."""
    last_BL: jax.Array
    """The place up to which a place sees: see `Images`."""


def image_sizes(cfg: ModelConfig) -> dict[str, int]:
    """The size of every letter of the projector's names and, in the encoder, of its own."""
    v = cfg.vision
    return {"U": v.merged_size, "X": cfg.width, "D": cfg.width, "Y": v.patch_size, "P": v.num_places}


def projector_params(cfg: ModelConfig) -> dict[str, str]:
    """Every parameter between the encoder and the decoder, and how it starts."""
    if not cfg.vision.patch:
        return {}
    if cfg.vision.projector == "linear":
        return {"image_UD": "normal"}
    return {"image_in_UX": "normal", "image_in_bias_X": "zeros", "image_out_XD": "normal", "image_out_bias_D": "zeros"}


def encoder_params(cfg: ModelConfig) -> tuple[dict[str, str], dict[str, str]]:
    """(every parameter of the encoder outside of its layers, those of its stacked layers), and how they start."""
    v, top = cfg.vision, {"patch_YD": "normal", "place_PD": "normal"}
    clip = {"class_D": "normal", "norm_in_D": "ones", "norm_in_bias_D": "zeros"}
    top |= clip if v.class_token else {"patch_bias_D": "zeros"}
    top |= {"norm_final_D": "ones", "norm_final_bias_D": "zeros"} if v.final_norm else {}
    return top, layer_params(cfg.encoder)


def encode_images(cfg: ModelConfig, params: Params, patches_IPY: jax.Array) -> jax.Array:
    """tokens_ITD of images, uint8 patches_IPY, in the decoder's width; `params` are the model's, stacked or not."""
    v, repeats = cfg.vision, cfg.vision.patch**2
    mean_Y, std_Y = (np.tile(np.array(x, np.float32), repeats) for x in (v.mean, v.std))
    x_IPY = ((patches_IPY.astype(jnp.float32) / 255 - mean_Y) / std_Y).astype(cfg.dtype)
    x_IPD = _encode(cfg.encoder, params["vision"], x_IPY) if v.layers else x_IPY
    k, side = v.merge, v.side // v.patch
    x = x_IPD.reshape(-1, side // k, k, side // k, k, x_IPD.shape[-1])
    x_ITU = jnp.moveaxis(x, 3, 2).reshape(len(x), v.num_tokens, v.merged_size)
    if v.projector == "linear":
        return linear(x_ITU, params, image="BLU,UD->BLD")
    h_ITX = linear(x_ITU, params, image_in="BLU,UX->BLX")
    h_ITX = jax.nn.gelu(h_ITX.astype(jnp.float32), approximate=False).astype(h_ITX.dtype)
    return linear(h_ITX, params, image_out="BLX,XD->BLD")


def _encode(cfg: ModelConfig, p: Params, x_IPY: jax.Array) -> jax.Array:
    """The encoder's stream x_IPD behind its final norm; `cfg` is its own."""
    x_IPD = linear(x_IPY, p, patch="BLY,YD->BLD")
    if "class_D" in p:
        class_I1D = jnp.broadcast_to(p["class_D"].astype(x_IPD.dtype), (len(x_IPD), 1, cfg.width))
        x_IPD = jnp.concatenate([class_I1D, x_IPD], axis=1)
    x_IPD = x_IPD + p["place_PD"].astype(x_IPD.dtype)
    if "norm_in_D" in p:
        x_IPD = norm(x_IPD, p["norm_in_D"], p["norm_in_bias_D"], cfg)
    places_IP = jnp.zeros(x_IPD.shape[:2], jnp.int32)
    mask = AttentionMask(places_IP + x_IPD.shape[1] - 1)  # every patch sees up to the last

    def body(x_IPD, layer):
        x_IPD, _ = block(cfg, layer, x_IPD, places_IP, mask)
        return constrain(x_IPD, "BLD"), None

    scanned = body if cfg.remat == "none" else remat(cfg, body)
    x_IPD, _ = jax.lax.scan(
        scanned, constrain(x_IPD, "BLD"), one_layer(p["layers"]), unroll=cfg.unroll or cfg.num_layers
    )
    x_IPD = x_IPD[:, 1:] if "class_D" in p else x_IPD
    return norm(x_IPD, p["norm_final_D"], p["norm_final_bias_D"], cfg) if "norm_final_D" in p else x_IPD


def image_tokens(cfg: ModelConfig, params: Params, images: Images) -> ImageTokens:
    """The tokens of a batch's images at their places."""
    rows, _, *patches = images.patches_BIPY.shape
    tokens_ITD = encode_images(cfg, params, images.patches_BIPY.reshape(-1, *patches))
    tokens_BSD = tokens_ITD.reshape(rows, -1, tokens_ITD.shape[-1])
    index_BL1 = jnp.maximum(images.index_BL, 0)[..., None]
    return ImageTokens(jnp.take_along_axis(tokens_BSD, index_BL1, axis=1), images.index_BL >= 0, images.last_BL)
