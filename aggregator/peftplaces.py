"""Where a weight of a delta lands in a PEFT LoRA adapter, and which weights no LoRA adapter can express.

    a delta's weight                W += B A, B (d_out, r), A (r, d_in)     peft's pair (its scaling is 1)
    linear, an untied output head   W (out, in)                             lora_A = A, lora_B = B
    Conv1D                          W (in, out)                             lora_A = B', lora_B = A'
    embedding                       W (vocabulary, width)                   lora_embedding_A = B', lora_embedding_B = A'

(peft: `Linear` and `Embedding` in tuners/lora/layer.py.) A delta does not say what its weights are: the base model
does. In a version's folder the manifest is asked, which needs neither torch nor peft; in any other folder the config,
from which transformers builds an empty model.

What always holds: what is not certain is refused with a reason, and nothing is guessed where a wrong guess would load
all the same. It reads no tensor values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from aggregator.basemodel import HEADS, BaseModel
from aggregator.layouts import CONV1D_LEAVES, CONV1D_MODELS
from rankup.checkfiles import sealed_manifest
from rankup.deltaheader import Layout
from rankup.errors import InputError, NotFoundError
from rankup.folder import ENVELOPE_NAME
from rankup.records import Manifest
from rankup.targets import Role
from rankup.versions import open_envelope

Kind = Literal["linear", "conv1d", "embedding"]
PREFIX: Final = "base_model.model."
_SUFFIXES: Final[Mapping[Kind, tuple[str, str]]] = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "conv1d": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}
_EMBEDDING: Final = re.compile(r"emb|wte|wpe")
_ONCE_EXPERTS: Final = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Where a model has stacked experts, peft takes these names for theirs, whichever layer they are in."""


@dataclass(frozen=True)
class Place:
    """Of one weight in the adapter. `transposed`: peft's A is the delta's B transposed, and the reverse."""

    module: str
    kind: Kind

    @property
    def transposed(self) -> bool:
        return self.kind != "linear"

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of peft's A (r, …) and B (…, r) in the adapter's file."""
        a, b = _SUFFIXES[self.kind]
        return f"{PREFIX}{self.module}{a}", f"{PREFIX}{self.module}{b}"


@dataclass(frozen=True)
class Refusal:
    """Why a weight cannot go into a LoRA adapter."""

    reason: str


@dataclass(frozen=True)
class Base:
    """What is known of the base model; of a mere name, nothing but that."""

    name: str | None = None
    roles: Mapping[str, tuple[Role | None, tuple[int, ...]]] | None = None
    """Weight -> role and stored shape; None where only the name is known."""
    conv1d: bool = False
    """Whether layers with the names of GPT-2's are Conv1D."""
    tied: bool = False
    """Whether the output head is the embedding's own weight."""
    manifest: str | None = None
    """Digest, where the folder is a version's."""

    @property
    def has_experts(self) -> bool:
        return any(role == "experts" for role, _ in (self.roles or {}).values())


def read_base(base: str | None) -> Base:
    """The model that an adapter is made for: a folder, or anything else as the name that the adapter's config carries.

    Raises NotFoundError (a path where no folder is), InputError (a folder without a readable model), IntegrityError (a
    version's folder with a broken manifest), SetupError.
    """
    if base is None:
        return Base()
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
            raise NotFoundError(f"there is no folder {base}", remedy="Give the base model's folder, or its hub name.")
        return Base(name=base)
    with BaseModel(folder) as model:
        conv1d, says_tied = model.has_type(CONV1D_MODELS), model.says_tied
    if (folder / ENVELOPE_NAME).is_file():
        manifest, digest, _ = open_envelope(sealed_manifest(folder), publisher_key=None)
        return _of_version(base, manifest, digest, conv1d=conv1d, says_tied=says_tied)
    from aggregator.skeleton import Skeleton

    skeleton = Skeleton.of(folder)
    roles = {name: (parameter.role, parameter.shape) for name, parameter in skeleton.parameters.items()}
    return Base(name=base, roles=roles, conv1d=conv1d, tied=skeleton.tied_head is not None)


def _of_version(name: str, manifest: Manifest, digest: str, *, conv1d: bool, says_tied: bool) -> Base:
    roles = {tensor: (entry.role, entry.shape) for tensor, entry in manifest.tensors.items()}
    # A version holds no head of its own where the head is the embedding.
    tied = says_tied or not any(tensor.endswith(HEADS) for tensor in manifest.tensors)
    return Base(name=name, roles=roles, conv1d=conv1d, tied=tied, manifest=digest)


def place(name: str, layout: Layout, base: Base) -> Place | Refusal:
    """Where the weight `name` of a delta lands. Raises InputError where the base is not the one it was made for."""
    if layout.slices > 1:
        return Refusal(f"a stack of {layout.slices} matrices, one for each expert")
    module, _, leaf = name.rpartition(".")
    role, shape = _look_up(name, base)
    if role == "vector" or (role is None and layout.d_in == 1):
        return Refusal("a vector: the scale of a norm, or a bias")
    if shape is not None and shape != (layout.d_out, layout.d_in):
        raise InputError(
            f"the delta changes {name} as {layout.d_out} x {layout.d_in}, but the base's is {list(shape)}",
            remedy="Give the version that the delta was trained on as --base.",
        )
    if leaf != "weight" or not module:
        return Refusal("no weight of a layer")
    last = module.rpartition(".")[2]
    if role == "embedding":
        if base.tied:
            return Refusal("an embedding that is the output head too: peft's merge_and_unload would add it twice")
        return Place(module, "embedding")
    if role is None:
        if _EMBEDDING.search(last) or name.endswith(HEADS):
            return Refusal("whether embedding and output head share one weight is not known without the base's folder")
        if last in CONV1D_LEAVES:
            return Refusal("stored as (in, out) in some models; that is not known without the base's folder")
    if base.has_experts and last in _ONCE_EXPERTS:
        return Refusal("in a model with stacked experts, peft takes this name for theirs")
    return Place(module, "conv1d" if base.conv1d and last in CONV1D_LEAVES else "linear")


def _look_up(name: str, base: Base) -> tuple[Role | None, tuple[int, ...] | None]:
    """Role and shape in the base; (None, None) where only its name is known."""
    if base.roles is None:
        return None, None
    role, shape = base.roles.get(name, (None, None))
    if role is None:
        raise InputError(
            f"the delta changes {name}, which {base.name} does not have, or not as a weight that is trained",
            remedy="Give the version that the delta was trained on as --base.",
        )
    return role, shape
