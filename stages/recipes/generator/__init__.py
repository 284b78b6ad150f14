"""Recipe 'generator': caption → bits, with a frozen tokenizer."""

from typing import Any


def build_recipe(config: Any) -> Any:
    """A `GeneratorRecipe`: its samples, the model it starts from, and the objective over both."""
    from stages.recipes.generator.objective import GeneratorObjective
    from stages.recipes.generator.recipe import GeneratorRecipe, fresh_model, open_sources, texts
    from stages.recipes.generator.start import start_model

    training, sources = config.generator, open_sources(config.data)
    model = fresh_model(config, lambda dtype: start_model(training, lambda: texts(sources, training), dtype))
    return GeneratorRecipe(config, sources, model, GeneratorObjective(model, training))


def plan_run(config: Any, arguments: Any) -> tuple[dict[str, Any], str]:
    """Work, hours and memory of a run."""
    from stages.plan.command import plan_of_generator

    return plan_of_generator(config, arguments)
