"""Keys that follow from the organiser's token: every replica has them, and no state is kept.

What always holds:
- one key for each purpose: what is signed for one is worth nothing for another;
- scrypt (RFC 7914) stands between token and key, or a signature would let its holder test guesses of a weak token at
  the speed of a hash;
- another token gives other keys: what was signed before is refused then.

No I/O.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache


@lru_cache(maxsize=8)
def derive_key(organiser_token: str, purpose: bytes) -> bytes:
    """32 bytes. Takes about 50 ms and 16 MiB the first time."""
    return hashlib.scrypt(organiser_token.encode(), salt=purpose, n=2**14, r=8, p=1, dklen=32)
