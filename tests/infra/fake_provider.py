"""A cloud on this machine, for Ray's autoscaler: its nodes are raylets here."""

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    """Ray's own, under a name by which a cluster file can ask for it."""
