"""Loads a model as its users' programs do.

load.py KIND            says "ready", reads a directory's name, loads, says "loaded", then a sum
load.py make-gguf FILE BYTES
load.py make-torch DIRECTORY BYTES
"""

import glob
import os
import sys


def files(directory, pattern):
    found = sorted(glob.glob(os.path.join(directory, pattern)))
    assert found, f"no {pattern} in {directory}"
    return found


def numpy_sum(arrays):
    import numpy

    return sum(int(a.reshape(-1).view(numpy.uint16).sum(dtype=numpy.uint64)) for a in arrays)


def torch_sum(tensors):
    import torch

    return sum(int(t.contiguous().view(torch.int16).sum(dtype=torch.int64)) for t in tensors)


def safetensors():
    import ml_dtypes  # noqa: F401  numpy knows no bfloat16
    from safetensors.numpy import load_file

    def load(directory):
        shards = [load_file(path) for path in files(directory, "*.safetensors")]
        return [tensor for shard in shards for tensor in shard.values()]

    return load, numpy_sum


def gguf():
    from gguf import GGUFReader

    def load(directory):
        (path,) = files(directory, "*.gguf")
        return [tensor.data.copy() for tensor in GGUFReader(path).tensors]

    return load, numpy_sum


def transformers():
    import torch
    from transformers import AutoModelForCausalLM

    def load(directory):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        # It returns with the weights mapped and unread; a device would get copies.
        return [parameter.detach().clone() for parameter in model.parameters()]

    return load, torch_sum


def runai():
    from runai_model_streamer import SafetensorsStreamer

    def load(directory):
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files(directory, "*.safetensors"))
            return [tensor.clone() for _, tensor in streamer.get_tensors()]

    return load, torch_sum


def fastsafetensors():
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load(directory):
        loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
        loader.add_filenames({0: files(directory, "*.safetensors")})
        buffer = loader.copy_files_to_device()
        tensors = [buffer.get_tensor(key).clone() for key in buffer.key_to_rank_lidx]
        buffer.close()
        loader.close()
        return tensors

    return load, torch_sum


def tensorizer():
    from tensorizer import TensorDeserializer

    def load(directory):
        (path,) = files(directory, "*.tensors")
        with TensorDeserializer(path, device="cpu", num_readers=8) as tensors:
            return [tensors[name].clone() for name in list(tensors.keys())]

    return load, torch_sum


def make_gguf(path, size):
    import numpy
    from gguf import GGUFWriter

    random = numpy.random.default_rng(1)
    writer = GGUFWriter(path, "llama")
    count = 16
    for number in range(count):
        tensor = random.integers(0, 1 << 15, int(size) // count // 2, dtype=numpy.uint16)
        writer.add_tensor(f"blk.{number}.weight", tensor.view(numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_torch(directory, size):
    import torch
    from tensorizer import TensorSerializer
    from transformers import LlamaConfig, LlamaForCausalLM

    # Two tables of 16 Mi elements and layers of 25 Mi, two bytes each.
    layers = max(1, (int(size) - (64 << 20)) // (50 << 20))
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=7168,
        num_hidden_layers=layers,
        num_attention_heads=16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=int(size) // 4)
    serializer = TensorSerializer(os.path.join(directory, "model.tensors"))
    serializer.write_module(model)
    serializer.close()


def main(kind, *arguments):
    makers = {"make-gguf": make_gguf, "make-torch": make_torch}
    if kind in makers:
        makers[kind](*arguments)
        return
    load, total = globals()[kind]()
    print("ready", flush=True)
    tensors = load(sys.stdin.readline().rstrip("\n"))
    print("loaded", flush=True)
    print(len(tensors), total(tensors), flush=True)


main(*sys.argv[1:])
