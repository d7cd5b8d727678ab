"""The model runner: one engine interface, its engines, and what makes a conversation movable.

``engine`` is the interface (token ids in, logits out; it knows nothing of text), ``transformers_engine`` its
reference on torch, ``sampling`` chooses tokens, ``generation`` is the loop, ``chat`` knows text and templates, and
``snapshot`` turns a generation state into a manifest and chunks and back. None but the engine's own modules
import torch.
"""

import os

# Said before torch loads OpenMP, here because every module of this package comes after it. By default its threads
# spin while they wait for each other: on a small machine that also runs a broker, a camera or a second model, decoding
# fell to a tenth (2 tokens/s against 24, two cores, four busy processes). Sleeping costs little on a quiet one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
