"""What the three components have in common: a module of ours, seen as a model of diffusers."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from torch import nn


class Component(ModelMixin, ConfigMixin):
    """Has the children of a module of ours, so that tensors keep their published names, and calls that module.

    The module itself is no child. It shares its own children with this one, so hooks on them and on `forward`, and every move to
    another device or dtype, reach what it computes with. It must have no parameters outside its children.
    """

    config_name = "config.json"
    inner: Any

    def hold(self, inner: nn.Module) -> None:
        """Called once, at the end of `__init__`."""
        assert not list(inner.parameters(recurse=False)) and not list(inner.buffers(recurse=False))
        object.__setattr__(self, "inner", inner)
        for name, child in inner.named_children():
            self.add_module(name, child)

    def train(self, mode: bool = True) -> "Component":
        super().train(mode)
        if "inner" in self.__dict__:
            self.inner.training = mode
        return self
