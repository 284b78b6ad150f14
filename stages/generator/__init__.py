"""Recipe 'generator': caption → bits, with a frozen tokenizer."""

from typing import Any


def build_recipe(config: Any) -> Any:
    """A `GeneratorRecipe`."""
    from stages.generator.recipe import GeneratorRecipe

    return GeneratorRecipe(config)


def plan_run(config: Any, arguments: Any) -> tuple[dict[str, Any], str]:
    """Work, hours and memory of a run."""
    from stages.plan.command import plan_of_generator

    return plan_of_generator(config, arguments)
