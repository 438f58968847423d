from torchvision import _Dummy
from torchvision.transforms import InterpolationMode  # noqa: F401


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Dummy
