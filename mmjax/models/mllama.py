"""Llama 3.2 Vision (Mllama): gated blocks in place of some of a language model's layers.

Grattafiori et al., "The Llama 3 Herd of Models" (2024), section 7. A Flamingo whose gated blocks
are shaped like the language model's, and whose encoder reads an image as tiles of a board
(`mmjax.models.tiled_vit`); all features of all tiles are keys and values. In the text there is one
token for an image. A token sees the last image before it; images with no text between them are
seen together. MLPs of gated blocks leave tokens as they are that come before any image.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.connectors import make_connector
from mmjax.models.flamingo import Context, Flamingo, GatedBlock, GatedConfig, logits_of
from mmjax.models.image_masks import at_places, first_places, last_images, latest, owners
from mmjax.models.lm import LM
from mmjax.models.tiled_vit import TiledViT, TiledViTConfig, tiles_there
from mmjax.models.vlm import TEXT, VLMConfig
from mmjax.nn.linear import Embedding
from mmjax.nn.masks import Labels, Mask
from mmjax.nn.stack import Stack
from mmjax.registry import check_choice
from mmjax.typing import Array, Float, Int

EARLY = ("none", "all")
PLACE_MISSING = (
    "Boards of tiles have several shapes, and `place` says which an image has: give it, as "
    "processor and layout make it."
)


@dataclasses.dataclass(frozen=True)
class MllamaConfig(VLMConfig):
    """Everything that decides what a Mllama computes.

    Attributes: those of `VLMConfig`, but that attention is causal and there is no newline, and
      connector: reads each tile by itself, its class token included.
      lm: without the gated blocks, which are not of its depth.
      image_token: stands in the text where an image is, and has a vector like any other.
      features: blocks of the encoder's first transformer that are read beside its output.
      looks: places of the gated blocks in the whole, counted from 0 over blocks of both kinds.
      new_tokens: number of tokens that are read but never written: the ids after those of the
        language model.
      early: what a token before any image attends to: "none" (the code that Meta published), or
        "all" the images of its sample, though they come later (transformers).
    """

    encoder: TiledViTConfig
    looks: tuple[int, ...] = ()
    new_tokens: int = 0
    early: str = "none"
    class_token: bool = True
    name: str = dataclasses.field(default="mllama", init=False)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "looks", tuple(sorted(set(self.looks))))
        check_choice("early", self.early, EARLY)
        if self.attention != "causal" or self.newline or self.features_norm:
            raise ValueError(
                f"attention={self.attention!r}, newline={self.newline}, features_norm="
                f"{self.features_norm}: these mean nothing to a Mllama; leave them at their "
                "defaults."
            )
        if self.connector.frames != 1 or not self.class_token:
            raise ValueError(
                f"connector.frames={self.connector.frames}, class_token={self.class_token}: the "
                "connector of a Mllama reads single tiles, class token and patches."
            )
        depth = self.lm.depth + len(self.looks)
        if not self.looks or self.looks[0] < 0 or self.looks[-1] >= depth:
            raise ValueError(
                f"looks={self.looks}: with lm.depth={self.lm.depth} there are places 0 to "
                f"{depth - 1}, of which at least one is a gated block's."
            )
        if not 0 <= self.image_token < self.vocab_size:
            raise ValueError(
                f"image_token={self.image_token} stands in the text, but there are vectors for "
                f"{self.vocab_size} tokens only: take one of them, or more new_tokens."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens that can be read: those of the language model, and new ones."""
        return self.lm.vocab_size + self.new_tokens

    @property
    def frames(self) -> int:
        return self.encoder.tiles

    @property
    def feature_width(self) -> int:
        return self.encoder.width * (1 + len(self.features))

    @property
    def image_tokens(self) -> int:
        """Places that an image has, one for each shape of a board; see `Mllama.run`."""
        return len(self.encoder.shapes)

    @property
    def visual_tokens(self) -> int:
        """Of an image."""
        return self.frames * self.connector.tokens(self.encoder.grid, self.extra)

    @property
    def sight_ends(self) -> tuple[int, ...]:
        """Of a Flamingo; nothing ends what a Mllama sees."""
        return ()

    @property
    def gated(self) -> GatedConfig:
        """Of each gated block."""
        lm = self.lm
        return GatedConfig(
            heads=lm.heads,
            kv_heads=lm.kv_heads,
            head_dim=lm.head_width,
            mlp_width=lm.mlp_width,
            activation=lm.activation,
            norm=lm.norm,
            norm_eps=lm.norm_eps,
            mlp_gated=lm.gated,
            qk_norm=True,
        )

    @property
    def runs(self) -> tuple[int, ...]:
        """Numbers of the language model's blocks before, between and after gated ones, of the
        shortest pattern that repeats: (3, 1) in the published models."""
        depth = self.lm.depth + len(self.looks)
        kinds = [place in self.looks for place in range(depth)]
        period = next(p for p in range(1, depth + 1) if kinds[:p] * (depth // p) == kinds)
        looks = [place for place in self.looks if place < period]
        ends = zip([-1, *looks], [*looks, period], strict=True)
        return tuple(end - start - 1 for start, end in ends)


class Mllama(Flamingo):
    """tokens [B, T], images [B, I, H, W, C], place [B, T] -> logits [B, T, V]. See `run`.

    `images` are tiles, `config.frames` of each image, the last ones zeros where its board has
    fewer. `place` [B, T] int32 says in one number which image of the row stands at a token, and the
    shape of its board: image * `config.image_tokens` + shape, both counted from 0; -1 for text;
    images stand in any order. `mmjax.load_processor` and the layout "mllama" make both. Other
    arguments are those of `Flamingo.run`.

    Raises:
      ValueError: images without `place` where boards have several shapes.
    """

    def __init__(self, config: MllamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = TiledViT(config.encoder, rngs=rngs)
        self.connector = make_connector(
            config.connector, config.feature_width, config.lm.width, rngs=rngs
        )
        self.gated = Stack(config, len(config.looks), block=GatedBlock, rngs=rngs)
        self.lm = LM(config.lm, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.new_token = (
            Embedding(config.new_tokens, config.lm.width, init=init, rngs=rngs)
            if config.new_tokens
            else None
        )

    def encode_images(
        self, images: Float[Array, "b i h w c"], shapes: Int[Array, "b n"]
    ) -> Float[Array, "b m d"]:
        """The visual tokens of each row, those of its tiles one after the other.

        Args:
          images: tiles, `config.frames` of each image.
          shapes: of the images' boards, numbered from 1; 0: no image.
        """
        config = self.config
        tiles = images.reshape(-1, config.frames, *images.shape[2:])
        features = self.encoder(tiles, shapes.reshape(-1), config.features)
        features = features.reshape(-1, *features.shape[2:])
        tokens, _ = self.connector(features, None, config.encoder.grid)
        return tokens.reshape(len(images), -1, tokens.shape[-1])

    def _grown_head(self, hidden: Array, dtype: jax.typing.DTypeLike) -> Array:
        """New tokens are never written."""
        return logits_of(self.lm.head, self.lm.token, hidden, dtype)

    def _start(
        self,
        tokens: Array,
        images: Array | None,
        mask: Array | None,
        place: Array | None,
        segments: Array | None,
        parents: Array | None,
        text: Array | None,
        text_mask: Array | None,
    ) -> tuple[Float[Array, "b t d"], Context]:
        if text is not None or text_mask is not None:
            raise ValueError("A Mllama's connector reads no text: leave `text` out.")
        embeddings = self._embed_text(tokens, mask)
        if images is None:
            nothing = self._nothing(tokens, embeddings.dtype)
            return embeddings, nothing._replace(looks=jnp.zeros_like(tokens, bool))
        kinds, count = self.config.image_tokens, images.shape[1] // self.config.frames
        if place is None:
            if kinds > 1:
                raise ValueError(PLACE_MISSING)
            place = self._places(tokens, mask)
        number = jnp.where(place >= 0, place // kinds, TEXT)
        # An image that is not there is NaN: under `jit` the only way to be noticed.
        embeddings = jnp.where((number < count)[:, :, None], embeddings, jnp.nan)
        stands = number[:, :, None] == jnp.arange(count, dtype=jnp.int32)
        shapes = jnp.max(jnp.where(stands, (place % kinds + 1)[:, :, None], 0), axis=1)
        visual = self.encode_images(images, shapes)
        there = tiles_there(self.config.encoder, shapes)
        mask, looks = self._seen(number, there, segments, parents)
        return embeddings, Context(visual, mask, looks)

    def _seen(
        self,
        number: Int[Array, "b t"],
        there: Array,
        segments: Array | None,
        parents: Array | None,
    ) -> tuple[Mask, Array]:
        """The mask from the text to the visual tokens, and which tokens look at images.

        Args:
          number: of the image that stands at each token, -1 for none.
          there: [B, I, tiles], which tiles of each image's board there are.
        """
        count, tiles = there.shape[1:]
        group = jnp.ones_like(number) if segments is None else segments
        # The sample that each image belongs to, 0 for those that stand nowhere.
        owner = owners(number, count, group)
        # Images are known by where they first stand, since their numbers need not rise.
        stand, here = first_places(number, count), number >= 0
        name = jnp.take_along_axis(stand, jnp.clip(number, 0, count - 1), axis=1)
        # The last image up to each token, and the first of its neighbours; 0 if there is none.
        follows = here[:, :-1] & (group[:, :-1] == group[:, 1:])
        follows = jnp.pad(follows, ((0, 0), (1, 0)))
        place = last_images(here, group, parents)
        last = at_places(name, place) + 1
        first = at_places(at_places(name, latest(here & ~follows)), place) + 1
        looks = place >= 0
        # Those that do not look have a parent that no other token has: to them alone, tiles that
        # are not there are as good as others.
        missing = number.shape[1] + 1
        parent = jnp.zeros_like(group) if parents is None else parents
        query = Labels(
            group=group,
            order=jnp.where(looks, last, number.shape[1] if self.config.early == "all" else 0),
            position=jnp.where(looks, first, 0),
            parent=jnp.where(looks, parent, group + missing),
        )
        theirs = jnp.where(owner > 0, owner + missing, 0)[:, :, None]
        kinds = jnp.where(there, owner[:, :, None], theirs)
        per_tile = self.config.visual_tokens // tiles

        def each(label: Array) -> Array:
            """Of images, or of their tiles, for each visual token."""
            label = jnp.broadcast_to(label, there.shape)
            return jnp.repeat(label.reshape(len(there), -1), per_tile, axis=1)

        order = each(stand[:, :, None] + 1)
        key = Labels(group=each(kinds), order=order, position=order)
        # A window of one place before the first: what lies before is not seen.
        return Mask(query, key, window=1), looks
