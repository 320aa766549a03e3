"""A version for other people's programs: GGUF for llama.cpp, an Ollama model around it, a hub, a signed bundle.

| module | subject |
|---|---|
| `ggufsource` | the Hugging Face folder: config, tensors by range, what the signed manifest says about them |
| `ggufmodel` | which GGUF tensors and hyperparameters a config stands for |
| `ggufvocab` | the tokenizer as llama.cpp knows it |
| `ggufkeys`, `ggufwriter` | the file's metadata; the file itself, streamed |
| `ggufconverter` | the same through llama.cpp's own converter |
| `quantize`, `quantizechild` | smaller types, through llama.cpp |
| `ggufexport` | one folder to as many files as were asked for |
| `ollama`, `chatparts`, `chatprobe` | a Modelfile; its template, learned from what the chat template renders |
| `newfile`, `childprocess` | files that appear when they are complete; programs that never outlive their caller |
| `hub`, `modelsigning` | a version in a repository of the Hugging Face hub; an OpenSSF model-signing bundle |

What always holds: a file appears under its name when it is complete, code that comes with a model is never run (its
chat template excepted, in a sandbox), and llama.cpp runs in child processes only.
"""
