"""What to_plain promises."""


def assert_plain(model, like):
    """The model's classes, attributes and names are those of one that was never converted."""
    assert [type(m) for m in model.modules()] == [type(m) for m in like.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in like.modules()]
    assert list(model.state_dict()) == list(like.state_dict())
