"""Other libraries' checkpoints: LoRA for PEFT, vLLM and diffusers out; LoRA, DoRA and (IA)³ of PEFT in. See `docs/interop.md`."""

from petiole.interop.exporting import Export, Exported, export
from petiole.interop.loading import load_peft
from petiole.interop.readers import READERS, Reader

__all__ = ["READERS", "Export", "Exported", "Reader", "export", "load_peft"]
