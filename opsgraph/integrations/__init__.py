"""opsgraph in other libraries' models; none of them is imported."""

from . import transformers

__all__ = ["transformers"]
