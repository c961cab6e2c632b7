"""`heterorl admin`: drain or evict a sampler, pause, resume or stop a run."""

import argparse
import asyncio

from services.commands.connection import add_connection_arguments, tls_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, what in (
        ("drain", "let a sampler finish, submit its spool and end"),
        ("evict", "end a sampler's session and refuse its id"),
        ("pause", "grant no leases and take no steps"),
        ("resume", "end a pause"),
        ("stop", "finish the step, write a checkpoint, end the learner"),
    ):
        action = actions.add_parser(name, help=what)
        add_connection_arguments(action, identity="admin")
        if name in ("drain", "evict"):
            action.add_argument("sampler", help="the sampler's id")
        if name == "evict":
            action.add_argument("--allow", action="store_true", help="let the id back instead")
        if name in ("pause", "stop"):
            action.add_argument("--reason", default="", help="for the learner's log")


def run(arguments: argparse.Namespace) -> int:
    from services.monitor import admin

    actions = {
        "drain": lambda: admin.drain(arguments.sampler),
        "evict": lambda: admin.evict(arguments.sampler, allow=arguments.allow),
        "pause": lambda: admin.pause(arguments.reason),
        "resume": admin.resume,
        "stop": lambda: admin.stop(arguments.reason),
    }
    asyncio.run(admin.perform(arguments.learner, tls_of(arguments), actions[arguments.action]()))
    print("done")
    return 0
