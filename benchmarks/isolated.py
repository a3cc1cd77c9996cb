"""A measurement in a process of its own: what crashes or does not end there takes nothing else along."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


class Unfinished(Exception):
    """The process gave no result: ``no end`` within the limit, or ``crash``."""


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], connection: Any) -> None:
    connection.send(function(*arguments))


def isolated(function: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """What a function of a module gives in a fresh process, ended after ``limit`` seconds; raises Unfinished."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, arguments, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise Unfinished("no end")
        return receiver.recv()
    except EOFError:
        raise Unfinished("crash") from None
    finally:
        process.kill()
        process.join()
