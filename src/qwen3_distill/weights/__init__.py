"""How weights travel from the learner to the engines that serve them.

Each module is one `WeightChannel`: `memory` within a process, `directory` through files, `ipc`
between processes of one GPU. `adapter_files` reads and writes adapters in peft's layout;
`directory.publish_directory` publishes a model directory. Nothing here trains or samples.
"""
