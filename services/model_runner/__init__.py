"""The model runner: one engine interface, its engines, and what makes a conversation movable.

``engine`` is the interface (token ids in, logits out; it knows nothing of text), ``transformers_engine`` its
reference on torch, ``sampling`` chooses tokens, ``generation`` is the loop, ``chat`` knows text and templates, and
``snapshot`` turns a generation state into a manifest and chunks and back. None but the engine's own modules
import torch.
"""
