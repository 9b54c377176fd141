"""``abyssal keys create|list|disable|enable|topup``: who may use a server, and for how much."""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from abyssal.cli.arguments import OneLineParser
from abyssal.serve.accounts.keys import Account, KeyLimits, KeyRing
from abyssal.serve.accounts.money import format_money, parse_money
from abyssal.serve.accounts.store import Store, default_path
from abyssal.serve.accounts.usage import Ledger

_DAY_SECONDS = 86_400.0
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    path = Path(options.file) if options.file else default_path()
    if options.action != "create" and not path.exists():
        raise ValueError(f"{path}: there are no accounts here; make the first key with `abyssal keys create NAME`")
    try:
        with Store(path, getattr(options, "currency", None) or "USD") as store:
            figures = _ACTIONS[options.action](store, options)
    except sqlite3.OperationalError as error:  # a full disk, a file that may not be written, one that stays locked
        raise OSError(f"{path}: {error}") from None
    if options.json:
        json.dump(figures, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _PRINTERS[options.action](figures)
    return 0


def _parser() -> OneLineParser:
    everywhere = OneLineParser(add_help=False)
    everywhere.add_argument("--file", help=f"with the accounts (default {default_path()})")
    everywhere.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser = OneLineParser(prog="abyssal keys", description="API keys of the server, and the balances that pay.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="create|list|disable|enable|topup")
    _add_create(actions.add_parser("create", parents=[everywhere], help="make a key, and show it this once"))
    actions.add_parser("list", parents=[everywhere], help="all keys, without their secrets")
    for action, summary in (("disable", "refuse a key from now on"), ("enable", "accept it again")):
        changed = actions.add_parser(action, parents=[everywhere], help=summary)
        changed.add_argument("name", help="of the key")
    topup = actions.add_parser("topup", parents=[everywhere], help="add to the balance that pays for a key")
    topup.add_argument("name", help="of the key")
    topup.add_argument("amount", help="such as 12.50; -5 takes back")
    topup.add_argument("--reference", help="of the payment: a second top-up with it changes nothing")
    return parser


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="by which you know the key")
    parser.add_argument("--account", help="that pays, shared by keys that name it (default: one of its own)")
    parser.add_argument("--balance", default="0", help="to begin with (default 0)")
    parser.add_argument("--postpaid", action="store_true", help="the account may owe money")
    parser.add_argument("--namespace", help="of the context cache, shared by keys that name it (default: its own)")
    parser.add_argument("--expires", help="days from now, or a date and time such as 2030-01-31T12:00")
    for name in _LIMITS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="at most (default: no limit)")
    parser.add_argument("--currency", type=_currency, help="of a new file of accounts (default USD)")


def _create(store: Store, options: argparse.Namespace) -> dict[str, Any]:
    if options.currency not in (None, store.currency):
        raise ValueError(f"--currency is {options.currency}, and the balances of {store.path} are in {store.currency}")
    balance = parse_money(options.balance)
    if balance < 0:
        raise ValueError(f"--balance is {options.balance}: a balance begins at 0 or above")
    keys = KeyRing(store)
    secret = keys.create(
        options.name,
        options.account,
        options.postpaid,
        options.namespace,
        _expiry(options.expires),
        KeyLimits(**{name: getattr(options, name) for name in _LIMITS}),
    )
    account = keys.find(options.name)
    if balance:
        Ledger(store).top_up(account.account_id, balance)
    return {"file": str(store.path), **_figures(keys.find(options.name), store.currency), "key": secret}


def _list(store: Store, options: argparse.Namespace) -> dict[str, Any]:
    keys = [_figures(account, store.currency) for account in KeyRing(store).all()]
    return {"file": str(store.path), "currency": store.currency, "keys": keys}


def _set_disabled(store: Store, options: argparse.Namespace) -> dict[str, Any]:
    return _figures(KeyRing(store).set_disabled(options.name, options.action == "disable"), store.currency)


def _top_up(store: Store, options: argparse.Namespace) -> dict[str, Any]:
    amount = parse_money(options.amount)
    account = KeyRing(store).find(options.name)
    receipt = Ledger(store).top_up(account.account_id, amount, options.reference)
    return {
        "account": account.account_name,
        "added": "0.00" if receipt.repeated else format_money(receipt.amount),
        "balance": format_money(receipt.balance),
        "currency": store.currency,
        "repeated": receipt.repeated,
    }


def _figures(account: Account, currency: str) -> dict[str, Any]:
    """What may be told of a key; amounts are text, since JSON's numbers are not exact everywhere."""
    return {
        "name": account.key_name,
        "hint": account.hint,
        "account": account.account_name,
        "balance": format_money(account.balance),
        "currency": currency,
        "postpaid": account.postpaid,
        "namespace": account.namespace,
        "disabled": account.disabled,
        "expires": account.expires,
        "created": account.created,
        **vars(account.limits),
    }


def _currency(text: str) -> str:
    if not re.fullmatch("[A-Z]{3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not three capital letters, such as USD")
    return text


def _expiry(text: str | None) -> float | None:
    """Seconds since the epoch; a date without a zone is in this machine's."""
    if text is None:
        return None
    try:
        return time.time() + float(text) * _DAY_SECONDS
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"--expires is {text!r}: write days, or a date such as 2030-01-31") from None


def _print_created(figures: dict[str, Any]) -> None:
    print(figures["key"])
    print(
        f"the key {figures['name']!r}, paid by {figures['account']!r} ({_balance(figures)}); keep it: "
        "only its digest is stored, and it is not shown again",
        file=sys.stderr,
    )


def _print_list(figures: dict[str, Any]) -> None:
    print(f"{figures['file']}: {len(figures['keys'])} keys")
    for key in figures["keys"]:
        print(f"  {key['name']} (…{key['hint']})  {', '.join(_facts(key))}")


def _facts(key: dict[str, Any]) -> list[str]:
    facts = [f"{key['account']}: {_balance(key)}", *(["postpaid"] if key["postpaid"] else [])]
    if key["disabled"]:
        facts.append("disabled")
    if key["expires"] is not None:
        verb = "expired" if key["expires"] <= time.time() else "expires"
        facts.append(f"{verb} {time.strftime('%Y-%m-%d %H:%M', time.localtime(key['expires']))}")
    return facts + [f"{name.replace('_', ' ')}: {key[name]}" for name in _LIMITS if key[name] is not None]


def _print_state(figures: dict[str, Any]) -> None:
    print(f"{figures['name']} is {'disabled' if figures['disabled'] else 'enabled'}")


def _print_top_up(figures: dict[str, Any]) -> None:
    what = "nothing, it was there already" if figures["repeated"] else figures["added"]
    print(f"{figures['account']}: added {what}; the balance is {_balance(figures)}")


def _balance(figures: dict[str, Any]) -> str:
    return f"{figures['balance']} {figures['currency']}"


_ACTIONS = {"create": _create, "list": _list, "disable": _set_disabled, "enable": _set_disabled, "topup": _top_up}
_PRINTERS = {
    "create": _print_created,
    "list": _print_list,
    "disable": _print_state,
    "enable": _print_state,
    "topup": _print_top_up,
}
