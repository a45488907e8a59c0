"""What is made of tensors of PyTorch once, and looked up from then on."""

import threading
from collections import OrderedDict

from torch.utils.weak import WeakTensorKeyDictionary

# Things of one tensor: of several views of it, say.
_MOST = 16


class ByTensor:
    """Things that were made of tensors. One is found for the same tensors, or the same views of them, unless
    PyTorch has counted a change since; and it goes with the first of the tensors, which is not kept alive.

    Nobody counts what changes in an inference tensor. `of_inference`: whether things of such are kept, for
    tensors that nobody changes; else they are made anew each time."""

    def __init__(self, *, of_inference=False):
        self._kept, self._lock = WeakTensorKeyDictionary(), threading.Lock()
        self._of_inference = of_inference

    def keeps(self, *tensors):
        """Whether things of these tensors are kept at all."""
        return self._of_inference or not any(tensor.is_inference() for tensor in tensors)

    def get(self, tensors, make, key=None):
        """The thing of these tensors, a tuple, and this key; made by `make` where there is none."""
        if not self.keeps(*tensors):
            return make()
        wholes, versions, key = _identified(tensors, key)
        with self._lock:
            of_whole = self._kept.get(wholes[0])
            found = None if of_whole is None else of_whole.get(key)
        if found is not None and found[0] == versions and all(map(_is, found[1], wholes[1:])):
            return found[2]
        made = make()
        self._keep(wholes, versions, key, made)
        return made

    def put(self, tensors, made, key=None):
        """Keeps what was made of these tensors elsewhere."""
        if self.keeps(*tensors):
            self._keep(*_identified(tensors, key), made)

    def _keep(self, wholes, versions, key, made):
        with self._lock:
            of_whole = self._kept.setdefault(wholes[0], OrderedDict())
            of_whole[key] = versions, wholes[1:], made
            of_whole.move_to_end(key)
            while len(of_whole) > _MOST:
                of_whole.popitem(last=False)


def _is(one, other):
    return one is other


def _identified(tensors, key):
    """The tensors that own what these show, their versions, and the key with what is shown of each."""
    wholes, versions, shown = [], [], []
    for tensor in tensors:
        whole = tensor._base
        wholes.append(tensor if whole is None else whole)
        versions.append(None if tensor.is_inference() else tensor._version)
        shown.append(None if whole is None else (tensor.storage_offset(), tensor.shape, tensor.stride()))
    return wholes, versions, (key, *shown)
