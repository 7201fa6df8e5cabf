"""Turn a cartridge as its authors save it (torch.save, a .pt file) into the safetensors file that kvsieve loads.

    python3 scripts/convert-cartridge.py cartridge.pt cartridge.safetensors --model meta-llama/Llama-3.2-3B-Instruct --rope-theta 500000

Such a file is a zip archive of a pickle and of raw numbers. Unpickling runs whatever the pickle asks for, so nothing is
unpickled here: its opcodes are listed, and the few that torch writes for dictionaries, lists and tensors are followed by
a small interpreter in which a name is only ever compared with a table. Any other opcode or name is refused, and nothing is
imported, called or looked up on its behalf.

Needs Python 3.9 or newer and its standard library; neither torch nor NumPy. docs/learned-caches.md describes the result.
"""

import argparse
import json
import os
import pickletools
import struct
import sys
import zipfile
from dataclasses import dataclass

# A pickle that only describes tensors takes a few hundred bytes for each.
LARGEST_PICKLE = 64 << 20


class Refused(Exception):
    """The file is not what it should be; the message says what was found."""


@dataclass(frozen=True)
class Name:
    """A name of the table below, as data."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Raw numbers of a member of the archive."""

    element: str
    key: str
    count: int


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int
    size: tuple
    stride: tuple


class ParameterList:
    """What torch writes for one: its state, a dictionary."""

    def __init__(self):
        self.state = {}


# Names of safetensors, and bytes per element.
ELEMENTS = {"torch.BFloat16Storage": "BF16", "torch.HalfStorage": "F16", "torch.FloatStorage": "F32"}
WIDTH = {"BF16": 2, "F16": 2, "F32": 4}

KNOWN = {
    "collections.OrderedDict",
    "__builtin__.set",
    "builtins.set",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.modules.container.ParameterList",
    *ELEMENTS,
}

MARK = object()


def name(module, attribute):
    text = f"{module}.{attribute}"
    if text not in KNOWN:
        raise Refused(f"its pickle names {text}, which no cartridge needs")
    return Name(text)


def numbers(value):
    """A tuple of whole numbers, none below 0."""
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise Refused("a tensor whose offset, extents or strides are no whole numbers from 0")
    return value


def stored(reference):
    """A storage, from what stands for it in the pickle."""
    if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
        raise Refused("a reference to something that is no storage")
    _, element, key, _device, count = reference
    if not (isinstance(element, Name) and element.text in ELEMENTS and isinstance(key, str)):
        raise Refused("a storage of an unknown kind")
    numbers((count,))
    return Storage(ELEMENTS[element.text], key, count)


def rebuilt(function, arguments):
    """What torch would make of a call, for the calls of a cartridge."""
    if not (isinstance(function, Name) and isinstance(arguments, tuple)):
        raise Refused("a call of something that is no name")
    if function.text == "collections.OrderedDict" and arguments == ():
        return {}
    if function.text.endswith(".set") and arguments == ([],):
        return ()
    if function.text == "torch._utils._rebuild_parameter" and len(arguments) == 3:
        if not isinstance(arguments[0], Tensor):
            raise Refused("a parameter that is no tensor")
        return arguments[0]
    if function.text == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 6:
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, Storage):
            raise Refused("a tensor without a storage")
        numbers((offset,))
        if len(numbers(size)) != len(numbers(stride)):
            raise Refused("a tensor with more extents than strides, or fewer")
        return Tensor(storage, offset, size, stride)
    raise Refused(f"a call of {function.text} with {len(arguments)} arguments")


def interpret(pickle):
    """The value a pickle describes: dictionaries, lists, tuples, plain values, `Tensor` and `ParameterList`."""
    stack, memo = [], {}

    def pop(kind=object):
        if not stack or stack[-1] is MARK:
            raise Refused("a pickle that takes more than it has")
        value = stack.pop()
        if not isinstance(value, kind):
            raise Refused(f"a pickle with a {type(value).__name__} where a {kind.__name__} belongs")
        return value

    def to_mark():
        values = []
        while stack:
            value = stack.pop()
            if value is MARK:
                return values[::-1]
            values.append(value)
        raise Refused("a pickle that takes more than it has")

    def put(target, pairs):
        if len(pairs) % 2 or not isinstance(target, dict):
            raise Refused("a pickle that fills something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2]):
            if not isinstance(key, (str, int)):
                raise Refused("a dictionary with a key that is no text")
            target[key] = value

    for opcode, argument, _ in pickletools.genops(pickle):
        op = opcode.name
        if op in ("PROTO", "FRAME"):
            continue
        if op == "STOP":
            return pop()
        if op == "MARK":
            stack.append(MARK)
        elif op in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op])
        elif op in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"):
            stack.append(argument)
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[op]())
        elif op == "TUPLE":
            stack.append(tuple(to_mark()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple([pop() for _ in range(int(op[-1]))][::-1]))
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            value = pop()
            memo[len(memo) if op == "MEMOIZE" else argument] = value
            stack.append(value)
        elif op in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise Refused("a pickle that refers to what it did not say")
            stack.append(memo[argument])
        elif op in ("APPEND", "APPENDS"):
            values = [pop()] if op == "APPEND" else to_mark()
            target = pop(list)
            target.extend(values)
            stack.append(target)
        elif op in ("SETITEM", "SETITEMS"):
            pairs = [pop(), pop()][::-1] if op == "SETITEM" else to_mark()
            target = pop(dict)
            put(target, pairs)
            stack.append(target)
        elif op == "GLOBAL":
            stack.append(name(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            attribute, module = pop(str), pop(str)
            stack.append(name(module, attribute))
        elif op == "BINPERSID":
            stack.append(stored(pop(tuple)))
        elif op == "REDUCE":
            arguments, function = pop(), pop()
            stack.append(rebuilt(function, arguments))
        elif op == "NEWOBJ":
            arguments, kind = pop(), pop()
            if kind != Name("torch.nn.modules.container.ParameterList") or arguments != ():
                raise Refused("an object that is no list of parameters")
            stack.append(ParameterList())
        elif op == "BUILD":
            state, target = pop(dict), pop(ParameterList)
            target.state = state
            stack.append(target)
        else:
            raise Refused(f"its pickle uses the opcode {op}, which no cartridge needs")
    raise Refused("a pickle that does not end")


class Archive:
    """The members of a file of torch.save."""

    def __init__(self, path):
        self.size = os.path.getsize(path)
        try:
            self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise Refused(
                "not a zip archive; if it was saved by torch before 1.6, load and save it there with a newer one"
            ) from error
        names = self.zip.namelist()
        if len(set(names)) != len(names):
            raise Refused("an archive with two members of one name")
        pickles = [n for n in names if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"an archive with {len(pickles)} members data.pkl instead of one")
        self.root = pickles[0][: -len("data.pkl")]
        if self.root + "byteorder" in names and self.read("byteorder") != b"little":
            raise Refused("numbers in big-endian order")

    def read(self, member):
        try:
            info = self.zip.getinfo(self.root + member)
        except KeyError:
            raise Refused(f"no member {member} in the archive") from None
        # torch stores members as they are, so that none is larger than the archive.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise Refused(f"a compressed member {member}")
        try:
            return self.zip.read(info)
        except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, NotImplementedError) as error:
            raise Refused(f"member {member}: {error}") from error

    def pickle(self):
        data = self.read("data.pkl")
        if len(data) > LARGEST_PICKLE:
            raise Refused(f"a pickle of {len(data)} bytes")
        try:
            return interpret(data)
        except ValueError as error:
            raise Refused(f"a damaged pickle: {error}") from error

    def rows(self, tensor):
        """The bytes of each KV head of a `[1, H, p, d]` tensor, `[p, d]` in order."""
        storage = tensor.storage
        width = WIDTH[storage.element]
        data = memoryview(self.read(f"data/{storage.key}"))
        if len(data) != storage.count * width:
            raise Refused(f"storage {storage.key} has {len(data)} bytes, {storage.count} elements of {width} were said")
        _, heads, entries, dim = tensor.size
        _, by_head, by_entry, by_dim = tensor.stride
        if heads * entries * dim > storage.count:
            raise Refused(f"a tensor of {heads * entries * dim} elements in a storage of {storage.count}")
        if entries == 0:
            return [b""] * heads
        last = tensor.offset + (heads - 1) * by_head + (entries - 1) * by_entry + (dim - 1) * by_dim
        if last >= storage.count:
            raise Refused(f"a tensor reaches to element {last} of a storage of {storage.count}")

        def piece(first, count):
            return bytes(data[first * width : (first + count) * width])

        def head(first):
            if by_dim == 1 and by_entry == dim:
                return piece(first, entries * dim)
            starts = [first + i * by_entry for i in range(entries)]
            if by_dim == 1:
                return b"".join(piece(start, dim) for start in starts)
            return b"".join(piece(start + j * by_dim, 1) for start in starts for j in range(dim))

        return [head(tensor.offset + h * by_head) for h in range(heads)]


def tensors(value, what):
    """The `[1, H, p, d]` tensors of a list, one for each layer; none of nothing."""
    if value is None:
        return []
    if isinstance(value, ParameterList):
        parameters = value.state.get("_parameters", {})
        if not isinstance(parameters, dict):
            raise Refused(f"{what} is a list of parameters without any")
        value = [parameters.get(str(i)) for i in range(len(parameters))]
    if not isinstance(value, (list, tuple)):
        raise Refused(f"{what} is no list")
    for layer, tensor in enumerate(value):
        if not isinstance(tensor, Tensor):
            raise Refused(f"{what}: layer {layer} is no tensor")
        if len(tensor.size) != 4 or tensor.size[0] != 1 or not (tensor.size[1] and tensor.size[3]):
            raise Refused(f"{what}: layer {layer} has the extents {list(tensor.size)}, not [1, KV heads, entries, dimension]")
    return list(value)


def sides(saved):
    """For keys and values, the frozen and the trained tensor of each layer; frozen is None where there is none."""
    if not isinstance(saved, dict):
        raise Refused("what was saved is no dictionary")
    result = {}
    for side, word in (("k", "keys"), ("v", "values")):
        trained = tensors(saved.get(f"trainable_{word}"), f"trainable_{word}")
        frozen = tensors(saved.get(f"fixed_{word}", saved.get(f"frozen_{word}")), f"fixed_{word}")
        if not trained:
            raise Refused(f"no trainable_{word}")
        if frozen and len(frozen) != len(trained):
            raise Refused(f"fixed_{word} has {len(frozen)} layers, trainable_{word} has {len(trained)}")
        for layer, (fixed, free) in enumerate(zip(frozen, trained)):
            (_, *fixed_heads), (_, *free_heads) = fixed.size, free.size
            if (fixed_heads[0], fixed_heads[2]) != (free_heads[0], free_heads[2]):
                raise Refused(f"{word} of layer {layer}: fixed {list(fixed.size)} beside trainable {list(free.size)}")
            if fixed.storage.element != free.storage.element:
                raise Refused(
                    f"{word} of layer {layer}: fixed {fixed.storage.element} beside trainable {free.storage.element}"
                )
        result[side] = list(zip(frozen or [None] * len(trained), trained))
    keys, values = len(result["k"]), len(result["v"])
    if keys != values:
        raise Refused(f"keys of {keys} layers, values of {values}")
    return result


def described(layers, arguments):
    """The file's header: what stands where, and what it says of itself."""
    header, offset = {}, 0
    shapes = set()
    counts = set()
    for index in range(len(layers["k"])):
        for side in ("k", "v"):
            fixed, free = layers[side][index]
            _, heads, trained, dim = free.size
            frozen = fixed.size[2] if fixed else 0
            counts.add((frozen + trained, frozen))
            shapes.add((side, heads, dim))
            length = heads * (frozen + trained) * dim * WIDTH[free.storage.element]
            header[f"layers.{index}.{side}"] = {
                "dtype": free.storage.element,
                "shape": [heads, frozen + trained, dim],
                "data_offsets": [offset, offset + length],
            }
            offset += length
    if len(counts) != 1:
        raise Refused(f"layers, or keys and values, of different numbers of entries (all, fixed): {sorted(counts)}")
    ((entries, frozen),) = counts
    if entries == 0:
        raise Refused("no entries")
    metadata = {
        "format": "kvsieve-cartridge",
        "version": "1",
        "layers": str(len(layers["k"])),
        "tokens": str(entries),
        "frozen": str(frozen),
    }
    if len(shapes) == 2:
        dims = {side: (heads, dim) for side, heads, dim in shapes}
        metadata |= {"kv_heads": str(dims["k"][0]), "head_dim": str(dims["k"][1]), "value_dim": str(dims["v"][1])}
    if arguments.model:
        metadata["model"] = arguments.model
    if arguments.rope_theta:
        metadata["rope_theta"] = repr(arguments.rope_theta)
    return {"__metadata__": metadata, **header}


def write(path, header, archive, layers):
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for index in range(len(layers["k"])):
                for side in ("k", "v"):
                    fixed, free = layers[side][index]
                    trained = archive.rows(free)
                    frozen = archive.rows(fixed) if fixed else [b""] * len(trained)
                    for head in zip(frozen, trained):
                        file.writelines(head)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("input", help="what torch.save wrote")
    parser.add_argument("output", help="the safetensors file to write")
    parser.add_argument("--model", help="name or fingerprint of the model it was trained for, for hosts to compare")
    parser.add_argument("--rope-theta", type=float, help="base of the model's rotary embedding, compared when it is loaded")
    arguments = parser.parse_args()
    try:
        archive = Archive(arguments.input)
        layers = sides(archive.pickle())
        header = described(layers, arguments)
        write(arguments.output, header, archive, layers)
    except (Refused, OSError) as error:
        sys.exit(f"convert-cartridge: {arguments.input}: {error}")
    metadata = header["__metadata__"]
    print(f"{arguments.output}: {metadata['layers']} layers, {metadata['tokens']} entries, {metadata['frozen']} of them frozen")


if __name__ == "__main__":
    main()
