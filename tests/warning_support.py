"""What a call warns of, and code that may warn of nothing."""

import contextlib
import warnings


def warned(call, about=""):
    """The warnings of call() that say `about`, as texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if about in str(each.message)]


@contextlib.contextmanager
def no_warning(kind=Warning):
    """A warning of this kind is an error inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", kind)
        yield
