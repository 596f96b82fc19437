"""Nodes of tomesd for ComfyUI: copy this folder into `ComfyUI/custom_nodes`, and see docs/hosts.md."""

try:
    from tomesd.tools.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ImportError as error:
    raise ImportError(
        "tomesd 1.0 is needed where this program runs, not the older one that pip finds: see docs/hosts.md"
    ) from error

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
