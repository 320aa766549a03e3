"""The child process of `quantize`: `python quantizechild.py SOURCE TARGET FTYPE THREADS`, with llama-cpp-python.

It needs nothing but the standard library and llama_cpp, so that any Python may run it, and prints what llama.cpp says.
"""

from __future__ import annotations

import sys


def main(source: str, target: str, ftype: str, threads: str) -> int:
    """Quantise one file; returns llama.cpp's code, 0 where it went well."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def say(_level: int, text: bytes, _user: object) -> None:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

    llama_cpp.llama_log_set(say, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(ftype)
    params.nthread = int(threads)
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
