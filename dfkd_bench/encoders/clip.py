"""``clip[:ARCH/WEIGHTS]``: open_clip's text features, not normalised as in NAYER (default ViT-B-32/openai, d = 512).

WEIGHTS is a tag of open_clip's or a checkpoint on this machine. None are shipped.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from dfkd_bench.encoders import NO_MODEL_NEEDED, Rows, TextEncoder, file_sha256
from dfkd_bench.encoders._hub import short_wait, state_sha256
from dfkd_bench.errors import UserError, unknown
from dfkd_bench.paths import expanded

DEFAULT_MODEL = "ViT-B-32/openai"
BATCH = 256  # texts at a time

_CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors")


class Clip(TextEncoder):
    """The text tower; the image tower is loaded with it and not used."""

    expected: ClassVar[str] = "'clip:ARCH/TAG' or 'clip:ARCH/CHECKPOINT', as in 'clip:ViT-B-32/openai'"
    libraries: ClassVar[tuple[str, ...]] = ("open_clip_torch", "torch")
    version: ClassVar[int] = 2  # 1: some tags' weights had GELU where they were trained with QuickGELU

    def __init__(self, name: str, argument: str = "") -> None:
        super().__init__(name, argument)
        self.architecture, _, self.source = (argument or DEFAULT_MODEL).partition("/")
        if not self.architecture or not self.source:
            raise UserError(f"text encoder '{self.spec}': expected {self.expected}")
        checkpoint = expanded(self.source)
        means_file = "/" in self.source or self.source.startswith("~") or checkpoint.suffix in _CHECKPOINTS
        self.checkpoint = checkpoint if means_file else None  # a tag means the same in every working directory
        if means_file and not checkpoint.is_file():
            raise UserError(f"text encoder '{self.spec}': there is no file {checkpoint}; expected {self.expected}")

    @property
    def model(self) -> str:
        return f"{self.architecture}/{self.checkpoint.resolve().name if self.checkpoint else self.source}"

    @property
    def title(self) -> str:
        return f"CLIP's weights '{self.architecture}/{self.source}' (not shipped)"

    @property
    def ways_out(self) -> str:
        # OpenAI's weights want QuickGELU. A tag says so, a checkpoint by path doesn't
        architecture = f"{self.architecture}-quickgelu" if self.source == "openai" else self.architecture
        return (
            f"Where they can be had, `dfkd-bench encode --encoder {self.spec} --dataset NAME --output FILE` makes the "
            "embeddings; FILE, or any matrix [K, d], is given by `-s METHOD.encoder=file:FILE`, a checkpoint on disk "
            f"by `-s METHOD.encoder=clip:{architecture}/CHECKPOINT`. {NO_MODEL_NEEDED}"
        )

    def weights(self) -> str | None:
        return None if self.checkpoint is None else f"sha256:{file_sha256(self.checkpoint)}"

    def encode(self, texts: Sequence[str]) -> tuple[Rows, str]:
        revision = self.weights()
        with short_wait(online=self.checkpoint is None):
            import open_clip
            import torch

            tokens = open_clip.get_tokenizer(self._known_architecture())(list(texts))
            with torch.inference_mode():
                rows = torch.cat([self._loaded.encode_text(part) for part in tokens.split(BATCH)])
            revision = revision or f"state-sha256:{state_sha256(self._loaded)}"
        return rows.float().numpy(), revision

    @functools.cached_property
    def _loaded(self) -> Any:
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(self.architecture)
        if self.checkpoint is None and self.source not in tags:
            raise unknown(f"weights of {self.architecture}", self.source, tags)
        weights = str(self.checkpoint or self.source)
        # open_clip goes by the architecture, and only warns if the weights of a tag want the other activation
        known = {} if self.checkpoint else open_clip.get_pretrained_cfg(self.architecture, self.source)
        quick = bool(known.get("quick_gelu", False))
        model = open_clip.create_model(self.architecture, pretrained=weights, device="cpu", force_quick_gelu=quick)
        return model.eval()

    def _known_architecture(self) -> str:
        import open_clip

        if self.architecture not in open_clip.list_models():
            near = difflib.get_close_matches(self.architecture, open_clip.list_models(), n=5)
            raise unknown("CLIP architecture", self.architecture, near, "`open_clip.list_models()` lists them all")
        return self.architecture
