"""The changes that the launcher makes to torch elastic."""

from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from cifar_exp.launch.elastic import _name_callers_cheaply


def name_of_caller() -> str:
    return str(dynamic_rendezvous.get_method_name())


def test_a_rendezvous_event_has_the_name_that_torch_gives_it_without_reading_sources() -> None:
    before = dynamic_rendezvous.get_method_name
    try:
        theirs = name_of_caller()
        _name_callers_cheaply()
        assert dynamic_rendezvous.get_method_name is not before
        assert name_of_caller() == theirs
        assert theirs.startswith("test_a_rendezvous_event")
    finally:
        dynamic_rendezvous.get_method_name = before
