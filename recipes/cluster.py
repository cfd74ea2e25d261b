"""The Ray cluster that a recipe of several nodes runs on, looked at before anything is loaded."""

from recipes.recipe import Recipe
from recipes.shared.settings import SettingsError

HOW = "`ray start --head` on the first node, `ray start --address FIRST:6379` on the others"


def check(recipe: Recipe) -> None:
    """Connect to the cluster of this machine, or of RAY_ADDRESS, and count its GPUs.

    Raises:
        SettingsError: No cluster, or not enough nodes with enough GPUs; says what is there.
    """
    import ray

    wanted = f"recipe {recipe.name} needs {recipe.nodes} nodes with {recipe.gpus_per_node} GPUs"
    try:
        # Without it, the host would start a cluster of this node alone and wait for ever.
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise SettingsError(f"{wanted}, and there is no Ray cluster here: {HOW}") from error
    try:
        nodes = {
            node["NodeManagerAddress"]: int(node["Resources"].get("GPU", 0))
            for node in ray.nodes()
            if node["Alive"]
        }
    finally:
        ray.shutdown()
    if sum(gpus >= recipe.gpus_per_node for gpus in nodes.values()) < recipe.nodes:
        there = ", ".join(f"{address} has {gpus}" for address, gpus in sorted(nodes.items()))
        raise SettingsError(f"{wanted} each, and in this Ray cluster {there}: {HOW}")
