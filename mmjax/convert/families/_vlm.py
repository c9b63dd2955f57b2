"""Vision-language models out of families that mmjax converts on their own.

A family of VLMs says where the config and the tensors of each of its parts stand; what they mean
is said once, by the part's own family, which is found by its `model_type`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx

from mmjax.connectors import ConnectorConfig
from mmjax.convert.family import Family, Source, families
from mmjax.convert.load import structure
from mmjax.convert.save import say
from mmjax.convert.table import ConversionError, Row, lay_out
from mmjax.models import LM, ViT
from mmjax.registry import nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Image towers whose hidden states, in transformers, are what blocks give, the last one included.
TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model of transformers.

    Attributes:
      field: of the whole's config, where the part's config stands.
      model: our module.
      ours: prefix of our parameters, "lm/".
      theirs: prefix of its tensors.
      body: what stands in their names where the part alone has "model."; None: `theirs` and that.
      types: the model types that are taken; None: all that have such a module.
    """

    field: str
    model: type[nnx.Module]
    ours: str
    theirs: str
    body: str | None = None
    types: tuple[str, ...] | None = None

    def from_hf(self, source: Source, hf: PretrainedConfig | None = None) -> Any:
        """The part's config of ours.

        Args:
          source: the whole's.
          hf: the part's config, where it is not simply in the whole's.

        Raises:
          ValueError: if its model type is not among those taken, or an option is not supported.
        """
        hf = getattr(source.config, self.field) if hf is None else hf
        known = self._families()
        if hf.model_type not in known:
            raise ValueError(
                f"{self.field} has model_type={hf.model_type!r}, which is not supported there; "
                f"{nearest(hf.model_type, known)}"
            )
        body = self._name("model.")
        names = (
            "model." + name.removeprefix(body)
            if name.startswith(body)
            else name.removeprefix(self.theirs)
            for name in source.names
            if name.startswith((body, self.theirs))
        )
        part = Source(hf, frozenset(names), source.directory)
        try:
            return known[hf.model_type].from_hf(part)
        except ValueError as error:
            raise ValueError(f"{self.field}: {error}") from error

    def to_hf(self, config: Any) -> PretrainedConfig:
        """The part's config of transformers.

        Raises:
          ConversionError: if no family computes this.
        """
        return self._fitting(config)[1]

    def rows(self, config: Any) -> tuple[Row, ...]:
        """The part's table, for the whole.

        Raises:
          ConversionError: if no family computes this.
        """
        return tuple(
            row._replace(theirs=self._name(row.theirs), ours=self._path(row.ours))
            for row in self._fitting(config)[0].rows(config)
        )

    def ignored(self, config: Any) -> tuple[str, ...]:
        """Patterns of the part's tensors that are knowingly not used."""
        patterns = self._fitting(config)[0].ignored(config)
        return tuple(re.escape(self.theirs) + pattern for pattern in patterns)

    def _name(self, name: str) -> str:
        if self.body is not None and name.startswith("model."):
            return self.body + name.removeprefix("model.")
        return self.theirs + name

    def _path(self, ours: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(ours, str):
            return self.ours + ours
        return tuple(self.ours + path for path in ours)

    @functools.cache  # noqa: B019 (parts are few, and stay)
    def _families(self) -> dict[str, Family]:
        """Those that may stand here, by model type; of several classes the first."""
        known = families()
        result: dict[str, Family] = {}
        for name in known:
            family = known[name]
            taken = self.types is None or family.model_type in self.types
            if family.model is self.model and taken:
                result.setdefault(family.model_type, family)
        return result

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _fitting(self, config: Any) -> tuple[Family, PretrainedConfig]:
        """The first family that computes what the config says, and how it says it."""
        shapes = structure(self.model, config)[1]
        reasons = []
        for family in self._families().values():
            try:
                entries = lay_out(family.rows(config), shapes)
                names = frozenset(entry.name for entry in entries)
                return family, say(family, config, names)
            except (ValueError, AttributeError) as error:
                reasons.append(f"  {family.model_type}: {str(error).splitlines()[0]}")
        raise ConversionError(
            f"{self.ours.rstrip('/')} is none of those that {self.field} may be:\n"
            + "\n".join(reasons)
        )


def tower(theirs: str, types: tuple[str, ...] = TOWERS) -> Part:
    """The image tower as a part: `vision_config`, and tensors of this prefix."""
    return Part("vision_config", ViT, "encoder/", theirs, types=types)


def language_model(theirs: str, body: str | None = None) -> Part:
    """Any decoder-only language model as a part: `text_config`; prefixes as in `Part`."""
    return Part("text_config", LM, "lm/", theirs, body)


def feature_blocks(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """`vision_feature_layer` -> `VLMConfig.features`.

    transformers counts the embeddings as the first of the hidden states, so that the output of
    block 0 has number 1 there; from the end both count alike.

    Raises:
      ValueError: if one is the embeddings, or there is no such layer.
    """
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    for layer in layers:
        if layer in (0, -depth - 1) or not -depth <= layer <= depth:
            raise ValueError(
                f"vision_feature_layer={list(layers)}: {layer} is not the output of one of the "
                f"{depth} blocks, which have the numbers 1 to {depth}, or -{depth} to -1."
            )
    return tuple(layer - 1 if layer > 0 else layer for layer in layers)


def feature_layers(features: Sequence[int]) -> int | list[int]:
    """The inverse of `feature_blocks`."""
    layers = [block + 1 if block >= 0 else block for block in features]
    return layers[0] if len(layers) == 1 else layers


def expect_connector(config: ConnectorConfig, kind: type[ConnectorConfig]) -> None:
    """Raises ValueError if a connector is of another kind than the format has."""
    if type(config) is not kind:
        raise ValueError(f"the connector is {config.name!r}; the format has {kind.name!r} only")
