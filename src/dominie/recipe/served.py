"""Models behind servers in a recipe, and teachers from caches: where they may stand."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dominie.core.errors import InputError
from dominie.core.task_result import LIKENESS
from dominie.evaluation.metrics import METRICS
from dominie.generation.endpoint import NO_WEIGHTS, PLACES
from dominie.teachers.cache_sampling import CacheSettings

if TYPE_CHECKING:
    from dominie.generation.prompt_answers import Answers, Keep
    from dominie.recipe import TrainStage
    from dominie.recipe.schema import Recipe

#: How a served teacher is cached if the recipe does not say: all that the server returns of a
#: token's distribution, and what is left as one outcome. Live, as many tokens are asked for.
_TOP = CacheSettings(enabled=False, scheme="top", top_p=1.0)


def refuse_served(recipe: Recipe, model: str, *, where: str) -> None:
    """Refuse a model behind a server in a place that needs weights.

    Raises:
        InputError: says where it can stand.
    """
    if (served := recipe.served.get(model)) is not None:
        raise InputError(NO_WEIGHTS, where=where, found=f"{model}, {served.title}", do=PLACES)


def check_served_teachers(recipe: Recipe, stage: TrainStage, *, where: str) -> None:
    """Refuse losses and caches that need more of a teacher than a server returns.

    A server returns the likeliest tokens and their log-probabilities, at temperature 1.

    Raises:
        InputError: names the key.
    """
    refuse_served(recipe, stage.student, where=f"{where}.student")
    for source in stage.active:
        name = stage.teacher_on(source) or ""
        if (served := recipe.served.get(name)) is None:
            continue
        here, loss, asked = f"{where}.data.{source}", stage.loss_on(source), stage.cache
        if served.tokenizer is None:
            raise InputError(
                "a teacher behind a server is sent token ids, and its tokenizer is not known",
                where=f"{where.partition(': ')[0]}: models.{name}.tokenizer",
                do="name the folder or hub id of the model that the server holds",
            )
        if fixed := {"prompt", "prompt_logprobs", "max_tokens", "temperature"} & {*served.request}:
            raise InputError(
                f"{min(fixed)} cannot be chosen where a server scores what is there already: "
                "log-probabilities of a prompt are at temperature 1, and nothing is generated",
                where=f"{where.partition(': ')[0]}: models.{name}.request.{min(fixed)}",
                do="remove it, or give the model a second name for writing answers",
            )
        if loss.needs_live_teacher:
            raise InputError(
                "a teacher behind a server returns the likeliest of the tokens that it predicts, "
                "and no states or weights",
                where=here,
                found=f"{name}, {served.title}; {_needs_of(stage, source)}",
                do="use prediction: {kind: forward_kl} alone",
            )
        if loss.prediction is not None and loss.prediction.temperature != 1.0:
            raise InputError(
                "a teacher behind a server is known at temperature 1 alone: servers apply no "
                "temperature to log-probabilities of a prompt, and from the likeliest tokens "
                "another one cannot be computed",
                where=f"{here}.loss.prediction.temperature",
                expected="1",
                found=f"{loss.prediction.temperature:g}",
            )
        mixed = stage.data[source]
        cached = mixed.cache or (mixed.cache is None and not mixed.on_policy)
        if cached and asked is not None and asked.enabled and asked.scheme != "top":
            raise InputError(
                "a server returns the likeliest tokens, and no samples of the others",
                where=f"{where}.cache.scheme",
                expected="top",
                found=asked.scheme,
                do="set cache: {scheme: top, top_p: 1.0, k_max: 64}, or leave cache out",
            )


def check_scored(recipe: Recipe, model: str, *, where: str) -> None:
    """Refuse tasks that need more of a scored model than a server gives.

    Raises:
        InputError: names the task.
    """
    if (served := recipe.served.get(model)) is None or recipe.evaluate is None:
        return
    for name, task in recipe.evaluate.tasks.items():
        what = "lm-eval's tasks run on" if task.lm_eval else f"{task.metric} compares"
        if task.lm_eval is not None or task.metric in LIKENESS:
            raise InputError(
                f"{what} a model in memory",
                where=where,
                found=f"{model}, {served.title}, and the task {name}",
                do="score it in a run without this task, or name a local copy of the model",
            )
        if served.tokenizer is None:
            raise InputError(
                "the questions of a task are made of tokens, and the tokenizer is not known",
                where=f"{where.partition(': ')[0]}: models.{model}.tokenizer",
                do="name the folder or hub id of the model that the server holds",
            )


def check_writer(recipe: Recipe, answers: Answers, *, where: str) -> None:
    """Refuse an address in the place of a model, and settings that a server's would overwrite.

    Raises:
        InputError: names the key.
    """
    name, here = answers.model, where.partition(": ")[0]
    if answers.keep is not None:
        _check_keep(recipe, answers.keep, where=f"{where}.keep")
    if name.startswith(("http://", "https://")):
        raise InputError(
            "an address is no name of a model",
            where=f"{where}.model",
            found=name,
            do="set models: {NAME: {endpoint: URL, model: NAME_THERE}} and answers.model: NAME",
        )
    if (served := recipe.served.get(name)) is None:
        return
    if answers.seed is not None:
        raise InputError(
            "servers differ in what a seed means to them: theirs draws as it does",
            where=f"{where}.seed",
            do=f"remove seed; models.{name}.request sends a field as it is",
        )
    if twice := {"temperature", "max_tokens", "top_p"} & {*served.request}:
        raise InputError(
            "what the answers stage sets would be overwritten",
            where=f"{here}: models.{name}.request.{min(twice)}",
            do="remove it there, and set temperature, top_p and max_new_tokens in the stage",
        )


def _check_keep(recipe: Recipe, keep: Keep, *, where: str) -> None:
    """Refuse a task that scores no answers, and a judge that is no server's."""
    tasks = recipe.evaluate.tasks if recipe.evaluate else {}
    if keep.judge is not None and keep.judge not in recipe.served:
        raise InputError(
            "answers are judged by a model behind a server",
            where=f"{where}.judge",
            expected=f"one of {', '.join(recipe.served) or 'models with an endpoint'}",
            found=keep.judge,
            do="give it an endpoint under models, or choose by the metric of a task",
        )
    if keep.task is not None and (
        keep.task not in tasks or METRICS[tasks[keep.task].metric].score is None
    ):
        scored = [name for name, task in tasks.items() if METRICS[task.metric].score is not None]
        raise InputError(
            "answers are chosen by a task whose metric scores answers",
            where=f"{where}.task",
            expected=f"one of {', '.join(scored) or 'evaluate.tasks'}",
            found=keep.task,
        )


def _needs_of(stage: TrainStage, source: str) -> str:
    """Name what a loss needs of a live teacher."""
    loss = stage.loss_on(source)
    if loss.weighs("attention"):
        return "the attention loss needs the teacher's queries and keys"
    if loss.weighs("spans"):
        return "spans needs the teacher's whole distribution, in its own tokens"
    kind = loss.prediction.kind if loss.prediction else "?"
    return f"prediction: {{kind: {kind}}} needs the teacher's probability of any token"


def with_served_teachers(recipe: Recipe, stage: TrainStage) -> TrainStage:
    """Write out how a stage caches teachers that are behind servers, if it does not say."""
    served = {each for each in stage.active if stage.teacher_on(each) in recipe.served}
    live = {n for n in served if stage.data[n].on_policy and stage.data[n].cache is None}
    data = {
        n: dataclasses.replace(m, cache=False) if n in live else m for n, m in stage.data.items()
    }
    cache = _TOP if served and stage.cache is None else stage.cache
    return dataclasses.replace(stage, data=data, cache=cache)


def check_caches(stage: TrainStage, *, where: str) -> None:
    """Refuse a cached teacher if the loss needs what no cache keeps.

    Raises:
        InputError: names the source.
    """
    for source in stage.active:
        if stage.data[source].cache and stage.teacher_on(source) is None:
            raise InputError(
                "this source has no teacher that could be cached",
                where=f"{where}.data.{source}.cache",
                do="remove cache, or give the source a teacher and a prediction loss",
            )
        if (cache := stage.cache_on(source)) is None:
            continue
        loss, here = stage.loss_on(source), f"{where}.data.{source}"
        live = f"set {here.partition(': ')[2]}.cache=false to keep this teacher in memory"
        if loss.weighs("attention"):
            raise InputError(
                "the attention loss needs its teacher in memory: a cache keeps what a teacher "
                "predicts, and a query and key for every layer would be a thousand times as "
                "large",
                where=here,
                do=f"remove the attention term, or {live}",
            )
        if loss.weighs("spans"):
            raise InputError(
                "a teacher with another tokenizer is needed in memory: a cache keeps no "
                "likelihoods of chunks",
                where=here,
                do=live,
            )
        if loss.prediction is not None and loss.prediction.kind != "forward_kl":
            raise InputError(
                "the divergence cannot be computed from a cache, which keeps a sparse target",
                where=f"{here}.loss.prediction.kind",
                expected="forward_kl",
                found=loss.prediction.kind,
                do=f"use forward_kl, or {live}",
            )
        most = cache.most_temperature
        if loss.prediction is not None and loss.prediction.temperature > most:
            raise InputError(
                "the temperature is too high for this cache: the noise of what it stores outweighs "
                "what the teacher says",
                where=f"{here}.loss.prediction.temperature",
                expected=f"at most {most:.3g} with the settings of the cache",
                found=f"{loss.prediction.temperature:g}",
                do=f"store more (a lower cache.threshold, more cache.samples), or {live}",
            )
    if stage.cache is not None and stage.cache.enabled and not stage.cached:
        raise InputError(
            "there is no teacher that could be cached",
            where=f"{where}.cache",
            do="remove cache; this stage needs no teacher in any case",
        )
