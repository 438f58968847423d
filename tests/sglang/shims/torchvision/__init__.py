"""In place of torchvision, which SGLang and transformers import for images: every name is a dummy."""

__version__ = "0.28.0"


class _Dummy:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return None


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Dummy
