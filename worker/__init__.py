"""The worker room: what runs on a volunteer's machine.

`agent` supervises (no torch), `trainer` is the child process that trains; the rest serves these two. The worker runs no
code from the server: it takes JSON and safetensors, nothing else.
"""
