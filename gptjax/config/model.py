"""The shape of the decoder, and how it reads images."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gptjax.config.attention import KERNELS, AttentionName, Unsupported
from gptjax.config.section import Section

REMAT_NAMES = ("query", "key", "value", "attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Section):
    """An image as tokens: a square of pixels, cut into patches, which an encoder reads; SigLIP's shape, or Fuyu's."""

    section: ClassVar[str] = "model.vision"

    patch: int = 0
    """Side of a patch in pixels; 0: the model reads no images."""
    side: int = 224
    """Side in pixels of the square that each image becomes; a multiple of patch x merge."""
    fit: Literal["pad", "stretch", "crop"] = "pad"
    """How an image becomes a square: in its proportions, in the middle of white; stretched; or its middle cut out."""
    margin: int = 0
    """Pixels by which the square is larger at first, cut off on the right and below (SigLIP of 384 pixels has 6)."""
    merge: int = 1
    """Patches on a side of the squares that become one token (pixel shuffle)."""
    layers: int = 0
    """Blocks of the encoder, in which every patch sees all; 0: none, a token is its pixels times one matrix (Fuyu)."""
    width: int = 768
    """Size of the encoder's stream."""
    num_heads: int = 12
    """Heads of the encoder's attention; a divisor of width."""
    mlp_ratio: float = 4.0
    """Width of the encoder's MLP as a multiple of its width."""
    norm_epsilon: float = 1e-6
    """Added to the variance under the root in each norm of the encoder."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Of the encoder's MLP: GELU in its tanh form (SigLIP), or x sigmoid(1.702 x) (CLIP)."""
    class_token: bool = False
    """CLIP's front: a learned token before the patches, dropped behind the encoder, a norm before its layers, and no
    bias of the patches."""
    final_norm: bool = True
    """A norm behind the encoder's last layer (SmolVLM); LLaVA has none."""
    projector: Literal["linear", "mlp"] = "linear"
    """From the encoder's width to the model's: one matrix (SmolVLM), or two with biases and a GELU between (LLaVA)."""
    sees_all: bool = True
    """The tokens of an image see all of it; else those before them, as text does."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Taken from red, green and blue, which go from 0 to 1."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """What they are divided by then."""
    begin: tuple[int, ...] = ()
    """Ids in front of every image."""
    end: tuple[int, ...] = ()
    """Ids behind every image."""
    image_id: int = -1
    """Id that stands for a place of an image in files of transformers, kept from an import; -1: an export adds one."""

    def __post_init__(self):
        self.require_numbers(0, math.inf, "patch", "layers", "margin")
        self.require_numbers(-1, math.inf, "image_id")
        self.require_positive("side", "merge", "width", "num_heads", "mlp_ratio", "norm_epsilon")
        self.require(self.width % self.num_heads == 0, "width", f"a multiple of num_heads={self.num_heads}")
        if self.patch:
            unit = self.patch * self.merge
            near = f"e.g. --model.vision.side {unit * max(1, round(self.side / unit))}"
            self.require(self.side % unit == 0, "side", f"a multiple of patch x merge = {unit}", near)
        for name in ("mean", "std"):
            self.require(len(getattr(self, name)) == 3, name, "three numbers, of red, green and blue")
        self.require(all(s > 0 for s in self.std), "std", "numbers above 0")
        for name in ("begin", "end"):
            self.require(all(i >= 0 for i in getattr(self, name)), name, "ids from 0 on")

    @property
    def num_patches(self) -> int:
        """Patches of an image, P; raster order."""
        return (self.side // self.patch) ** 2

    @property
    def num_places(self) -> int:
        """Places of the encoder's stream: the patches, and the class token."""
        return self.num_patches + self.class_token

    @property
    def patch_size(self) -> int:
        """Numbers of a patch, Y: 3 x patch x patch."""
        return 3 * self.patch**2

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, without those around it."""
        return self.num_patches // self.merge**2

    @property
    def tokens_around(self) -> int:
        """Tokens that an image adds to a text: its own, and those in front of it and behind."""
        return self.num_tokens + len(self.begin) + len(self.end)

    @property
    def merged_size(self) -> int:
        """Numbers from which the projector makes a token, U: those of merge x merge patches."""
        return self.merge**2 * (self.width if self.layers else self.patch_size)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Shape of the decoder; GPT-2, Llama, Qwen, Gemma, NanoChat and Cohere are settings of it."""

    section: ClassVar[str] = "model"

    num_layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Size of the residual stream; a multiple of num_heads."""
    num_heads: int = 12
    """Query heads of each attention."""
    queries_per_kv: int = 1
    """Query heads that share one key-value head (grouped queries); 1 is plain multi-head attention."""
    head_dim: int = 0
    """Size of each head; 0: width / num_heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP as a multiple of the model's width; see mlp_width for how a fraction is rounded."""
    embedding: Literal["plain", "scaled", "normed"] = "plain"
    """Token embeddings enter as they are, times sqrt(width) rounded to dtype (Gemma), or normed without weights
    (NanoChat)."""
    positions: Literal["learned", "rope"] = "learned"
    """A learned position table (GPT-2), or rotary positions (Llama)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm (GPT-2) or RMSNorm (Llama), computed in float32."""
    norm_weights: Literal["scale", "offset", "none"] = "scale"
    """Weights of norms: the scale, its difference from 1 (Gemma), or none (NanoChat)."""
    post_norms: bool = False
    """Norms of the outputs of attention and MLP too, before they join the stream (Gemma 2)."""
    activation: Literal["gelu", "geglu", "swiglu", "relu2", "quick_gelu"] = "gelu"
    """GELU in its tanh form (GPT-2), the same as a gate (Gemma), a SiLU gate (Llama), ReLU squared (Primer), or
    x sigmoid(1.702 x) (CLIP)."""
    biases: bool = True
    """Biases in every projection and norm (GPT-2)."""
    qkv_biases: bool = False
    """Biases in the projections to queries, keys and values alone (Qwen 2); without biases."""
    tied: bool = True
    """The output head is the embedding."""
    rope_theta: float = 10_000.0
    """Base wavelength of rotary positions."""
    rope_theta_local: float = 0.0
    """The same in layers with a sliding window, where rope_scaling has no effect then (Gemma 3); 0: as elsewhere."""
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"
    """How rotary positions reach beyond the context they were trained for."""
    rope_factor: float = 1.0
    """How many times longer the context becomes by rope_scaling."""
    rope_original_length: int = 0
    """Context that the model was trained for before rope_scaling (yarn, llama3); 0 for the others."""
    window: int = 0
    """Tokens that a position attends to, itself included, in layers with a sliding window; 0: no window."""
    global_every: int = 0
    """With a window, every so many-th layer attends to everything; 0: none does."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotation."""
    attention_divisor: float = 0.0
    """Attention scores are divided by the root of this (Gemma); 0: of the size of a head."""
    attention_softcap: float = 0.0
    """Attention scores s become c tanh(s / c) with this c; 0: they stay."""
    logit_scale: float = 1.0
    """Factor of the logits, before their soft cap (Cohere)."""
    logit_softcap: float = 0.0
    """Logits z become c tanh(z / c) with this c; 0: they stay."""
    parallel: bool = False
    """Attention and MLP read the same norm of the block's input and are added together (GPT-J, PaLM)."""
    norm_epsilon: float = 1e-5
    """Added to the variance under the root in each norm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; divided by sqrt(2 num_layers) where a branch rejoins the stream."""
    mup_base_width: int = 0
    """Width at which learning rate and init_std were tuned; muP carries them over to this width. 0: no muP. The base
    has as many heads as this model where head_dim is 0, else heads of that size."""
    dropout: float = 0.0
    """Chance of dropping an element of the embedding, of an attention weight and of each branch.

    Which ones are dropped depends on mesh.context (as little else does), whose devices draw for their own places.
    """
    dtype: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    """Type of activations and products; weights and optimizer stay float32. auto: bfloat16 where the device multiplies
    it at least 1.3 times as fast as float32, decided when a run begins and kept from then on."""
    attention: AttentionName = "auto"
    """By device and length (auto); the plain product of queries and keys; blocks of them with an online softmax
    (blockwise): memory linear in length; cuDNN's fused kernel on a GPU; the splash kernel on a TPU."""
    attention_block: int = 512
    """Keys, and queries, in one block of blockwise attention."""
    remat: Literal["none", "full", "dots", "names", "offload"] = "none"
    """What the backward pass computes again: nothing, each block, all but its matrix products, all but what remat_names
    lists, or the same with that kept in the host's memory."""
    remat_names: tuple[str, ...] = ("attention",)
    """What remat=names and remat=offload keep of each block: of query, key, value (the projections), attention (its
    output), mlp (its products before the activation)."""
    block: str = ""
    """Function or class module:name that is one layer, in place of gptjax.model.block.block."""
    unroll: int = 1
    """Layers in one step of the compiled loop over layers; 0 unrolls all (slower to compile, often faster to run)."""
    vision: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self):
        self.require_positive("num_layers", "width", "num_heads", "queries_per_kv", "mlp_ratio", "rope_theta",
                              "norm_epsilon", "init_std", "logit_scale")  # fmt: skip
        self.require(
            self.head_dim > 0 or self.width % self.num_heads == 0,
            "width",
            f"a multiple of model.num_heads={self.num_heads}",
            f"e.g. --model.width {self.num_heads * max(1, self.width // self.num_heads)}",
        )
        grouped = self.num_heads % self.queries_per_kv == 0
        self.require(grouped, "queries_per_kv", f"a divisor of model.num_heads={self.num_heads}")
        even, owner = self.positions != "rope" or self.head_size % 2 == 0, "head_dim" if self.head_dim else "width"
        self.require(even, owner, f"an even head size for rotary positions; model.num_heads={self.num_heads}")
        self.require_numbers(0, math.inf, "head_dim", "rope_original_length", "window", "global_every",
                             "attention_divisor", "attention_softcap", "logit_softcap", "mup_base_width",
                             "rope_theta_local")  # fmt: skip
        self.require_positive("attention_block")
        self._require_rope()
        local = self.window > 0 or self.global_every == 0
        self.require(local, "global_every", "0 where model.window=0", "set --model.window too")
        most = f"at most model.num_layers={self.num_layers}, or no layer would attend to everything"
        self.require(self.global_every <= self.num_layers, "global_every", most)
        found = None if self.attention == "auto" else self.attention_refusal(self.attention)
        if found:
            advice = f"set --model.{found.field.replace('_', '-')} {found.value} or --model.attention auto"
            self.require(False, found.field, f"{found.wanted} with model.attention={self.attention}", advice)
        once = not (self.biases and self.qkv_biases)
        self.require(once, "qkv_biases", "False where model.biases=True has them", "set --model.no-biases")
        known = set(self.remat_names) <= set(REMAT_NAMES) and len(set(self.remat_names)) == len(self.remat_names)
        each = f"one or more of {', '.join(REMAT_NAMES)}, each once"
        self.require(known and len(self.remat_names) > 0, "remat_names", each)
        self.require(0 <= self.dropout < 1, "dropout", "a chance from 0 up to, not including, 1")
        if self.vision.patch:
            self.require(not self.mup_base_width, "mup_base_width", "0 for a model that reads images")
            self.require(not self.block, "block", "our own for a model that reads images")
        self.require(0 <= self.unroll <= self.num_layers, "unroll", f"0 (all) or 1 to num_layers={self.num_layers}")

    def _require_rope(self):
        scaled, named = self.rope_scaling != "none", f"model.rope_scaling={self.rope_scaling}"
        rotary = f"none where model.positions={self.positions}"
        self.require(self.positions == "rope" or not scaled, "rope_scaling", rotary, "set --model.positions rope")
        self.require_numbers(1, math.inf, "rope_factor")
        self.require(scaled or self.rope_factor == 1, "rope_factor", f"1 where {named}", "set --model.rope-scaling too")
        if self.rope_scaling in ("yarn", "llama3"):
            self.require(self.rope_original_length > 0, "rope_original_length", f"the context before {named}")
        else:
            unused = f"0 where {named}, which has no use for it"
            self.require(self.rope_original_length == 0, "rope_original_length", unused)
        near = self.rope_theta_local == 0 or (self.window > 0 and self.positions == "rope")
        self.require(near, "rope_theta_local", "0 without rotary positions and a window", "set --model.window")
        self.require(self.rope_scaling != "yarn" or self.rope_theta > 1, "rope_theta", f"more than 1 with {named}")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // self.queries_per_kv

    @property
    def gated(self) -> bool:
        """True where the MLP's hidden layer is a product of two projections."""
        return self.activation in ("swiglu", "geglu")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None where it attends to everything."""
        local = [self.window > 0 and not (self.global_every and n % self.global_every == 0)
                 for n in range(1, self.num_layers + 1)]  # fmt: skip
        return tuple(self.window if one else None for one in local)

    def attention_refusal(self, name: str, capability: float | None = None) -> Unsupported | None:
        """The first setting that attention by this name can't honour, on a device of this capability or on any."""
        kernel = KERNELS[name]
        most = max((size for least, size in kernel.head_most if capability is None or capability >= least), default=0)
        fits = self.head_size % kernel.head_multiple == 0 and (not most or self.head_size <= most)
        one_window = len(set(self.layer_windows)) == 1
        checks = [
            (kernel.dropout or self.dropout == 0, "dropout", "0", "0"),
            (kernel.softcap or self.attention_softcap == 0, "attention_softcap", "0", "0"),
            (self.dtype in (*kernel.dtypes, "auto"), "dtype", " or ".join(kernel.dtypes), kernel.dtypes[0]),
            (kernel.mixed_windows or one_window, "global_every", "0, one window for all layers", "0"),
            (kernel.images or not self.vision.patch, "vision.patch", "0", "0"),
            (fits, "head_dim", f"heads of a multiple of {kernel.head_multiple} and at most {most} numbers", "64"),
        ]
        return next((Unsupported(field, wanted, value) for ok, field, wanted, value in checks if not ok), None)

    @property
    def encoder(self) -> "ModelConfig":
        """The blocks that read the patches of an image, as a model: SigLIP's (Zhai et al. 2023), which are GPT-2's."""
        v = self.vision
        return ModelConfig(
            num_layers=v.layers, width=v.width, num_heads=v.num_heads, mlp_ratio=v.mlp_ratio,
            norm_epsilon=v.norm_epsilon, activation=v.activation, init_std=self.init_std, dtype=self.dtype,
            attention="plain", remat=self.remat, remat_names=self.remat_names, unroll=min(self.unroll, v.layers),
        )  # fmt: skip

    def anywhere(self) -> "ModelConfig":
        """The same model on any device: attention that one platform alone has becomes auto."""
        bound = self.attention != "auto" and KERNELS[self.attention].only_on
        return dataclasses.replace(self, attention="auto") if bound else self

    @property
    def mlp_width(self) -> int:
        """width x mlp_ratio; where that is no whole number, rounded up to one that meshes divide, as Llama does.

        The multiple is a power of two from 8 to 256, about width / 16: 8/3 x 64 gives 176, and x 4,096 gives 11,008.
        """
        exact = self.width * self.mlp_ratio
        if math.isclose(exact, round(exact), rel_tol=1e-6):
            return round(exact)
        multiple = min(256, max(8, 2 ** int(math.log2(max(self.width, 16) / 16))))
        return math.ceil(exact / multiple) * multiple
