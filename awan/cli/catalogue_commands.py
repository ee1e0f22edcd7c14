"""`awan location|tier|pool|template ...`: what is sold, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from rich.table import Table

from awan.cli.http_client import OperatorClient
from awan.cli.screen import console, say_error

locations = typer.Typer(help="Locations and their engines.", no_args_is_help=True)
tiers = typer.Typer(help="Tiers and their prices.", no_args_is_help=True)
pools = typer.Typer(help="Public prefixes.", no_args_is_help=True)
templates = typer.Typer(help="Templates and their images.", no_args_is_help=True)


@locations.command("list")
def list_locations() -> None:
    """List locations and their engines."""
    table = Table("id", "name", "code", "country", "in sale", "engines", box=None)
    for row in OperatorClient().get("/admin/locations"):
        engines = ", ".join(f"{engine['kind']}={engine['driver']}" for engine in row["engines"])
        table.add_row(
            str(row["id"]),
            row["name"],
            row["code"],
            row["country"],
            "yes" if row["is_enabled"] else "no",
            engines or "none",
        )
    console.print(table)


@locations.command("add")
def add_location(
    name: Annotated[str, typer.Argument(help="Name, such as 'Jakarta 1'.")],
    code: Annotated[str, typer.Option(help="Short code, such as jkt1.")],
    country: Annotated[str, typer.Option(help="ISO 3166 code, such as ID.")],
    default: Annotated[bool, typer.Option(help="Make it the default.")] = False,
) -> None:
    """Add a location."""
    body = {"name": name, "code": code, "country": country, "is_default": default}
    row = OperatorClient().call("POST", "/admin/locations", body)["data"]
    console.print(f"location {row['id']}")


@locations.command("engine")
def set_engine(
    location: Annotated[int, typer.Argument(help="Id of the location.")],
    kind: Annotated[str, typer.Argument(help="hypervisor, volumes, fabric or nameserver.")],
    driver: Annotated[str, typer.Argument(help="libvirt, local, ovn, rfc2136 or fake.")],
    options: Annotated[str, typer.Option(help="The driver's options as JSON.")] = "{}",
) -> None:
    """Say which driver serves an engine of a location."""
    try:
        given = json.loads(options)
    except json.JSONDecodeError as err:
        say_error(f"--options is not JSON: {err}")
        raise typer.Exit(1) from err
    body = {"driver": driver, "options": given}
    path = f"/admin/locations/{location}/engines/{kind}"
    console.print(OperatorClient().call("PUT", path, body)["message"])


@tiers.command("list")
def list_tiers() -> None:
    """List tiers and their limits."""
    table = Table(
        "id", "name", "CPUs", "vCPU", "memory GiB", "storage GiB", "locations", "prices", box=None
    )
    for row in OperatorClient().get("/admin/tiers"):
        limits = row["limits"]
        offers = [name for name in ("shared", "dedicated") if row[f"offers_{name}"]]
        table.add_row(
            str(row["id"]),
            row["name"],
            ", ".join(offers),
            *(f"{limits[key]['min']}-{limits[key]['max']}" for key in ("cpu", "memory", "storage")),
            ", ".join(map(str, row["location_ids"])) or "none",
            "; ".join(
                f"{currency} without {', '.join(lacking)}" if lacking else currency
                for currency, lacking in row["unpriced"].items()
            )
            or "none",
        )
    console.print(table)


@tiers.command("add")
def add_tier(
    name: Annotated[str, typer.Argument(help="Name, such as 'Cloud Compute'.")],
    cpu_model: Annotated[str, typer.Option(help="What customers are told of the CPU.")],
    location: Annotated[list[int], typer.Option(help="Id of a location; may be repeated.")],
    dedicated: Annotated[bool, typer.Option(help="Offer dedicated CPUs.")] = False,
    shared: Annotated[bool, typer.Option(help="Offer shared CPUs.")] = True,
    cpu_max: Annotated[int, typer.Option(help="Most vCPUs of an instance.")] = 16,
    memory_gib_max: Annotated[int, typer.Option(help="Most memory of an instance.")] = 64,
    storage_gib_max: Annotated[int, typer.Option(help="Largest root disk.")] = 1000,
    cpu_overcommit: Annotated[int, typer.Option(help="vCPUs per 100 hardware threads.")] = 400,
) -> None:
    """Add a tier; set its prices with `awan tier price`."""
    body = {
        "name": name,
        "cpu_model": cpu_model,
        "location_ids": location,
        "offers_dedicated": dedicated,
        "offers_shared": shared,
        "cpu_max": cpu_max,
        "memory_gib_max": memory_gib_max,
        "storage_gib_max": storage_gib_max,
        "cpu_overcommit_percent": cpu_overcommit,
    }
    row = OperatorClient().call("POST", "/admin/tiers", body)["data"]
    console.print(f"tier {row['id']}")


@tiers.command("price")
def set_price(
    tier: Annotated[int, typer.Argument(help="Id of the tier.")],
    component: Annotated[str, typer.Argument(help="cpu_shared, memory, storage, public_ip, ...")],
    monthly: Annotated[int, typer.Argument(help="Minor units of the currency a month.")],
    currency: Annotated[str, typer.Option(help="ISO 4217 code.")] = "IDR",
) -> None:
    """Set a price from now on, and say what has none yet; what was sold keeps its price."""
    body = {"component": component, "currency": currency, "monthly_minor": monthly}
    client = OperatorClient()
    row = client.call("POST", f"/admin/tiers/{tier}/prices", body)["data"]
    console.print(
        f"{row['component']}: {row['price_per_month']} {row['currency']} a month per {row['unit']},"
        f" {row['price_per_hour']} an hour"
    )
    (changed,) = (one for one in client.get("/admin/tiers") if one["id"] == tier)
    if lacking := changed["unpriced"][row["currency"]]:
        console.print(f"still without a price in {row['currency']}: {', '.join(lacking)}")


@pools.command("list")
def list_pools() -> None:
    """List public prefixes and what of them is in use."""
    table = Table("id", "location", "prefix", "gateway", "network", "addresses", box=None)
    for row in OperatorClient().get("/admin/pools"):
        vlan = f" vlan {row['vlan']}" if row["vlan"] else ""
        states = ", ".join(
            f"{number} {state}" for state, number in sorted(row["addresses"].items())
        )
        table.add_row(
            str(row["id"]),
            str(row["location_id"]),
            row["cidr"],
            row["gateway"],
            f"{row['physical_network']}{vlan}",
            states or "drawn as needed",
        )
    console.print(table)


@pools.command("add")
def add_pool(
    cidr: Annotated[str, typer.Argument(help="IPv4 prefix, or an on-link IPv6 /64.")],
    gateway: Annotated[str, typer.Option(help="The provider's router in the prefix.")],
    location: Annotated[int, typer.Option(help="Id of the location.")],
    physical_network: Annotated[str, typer.Option(help="Name in ovn-bridge-mappings.")] = "public",
    vlan: Annotated[int | None, typer.Option(help="VLAN of the provider network.")] = None,
    dns: Annotated[list[str] | None, typer.Option(help="DNS server for guests.")] = None,
    reserve: Annotated[list[str] | None, typer.Option(help="Address never given out.")] = None,
) -> None:
    """Add a public prefix."""
    body = {
        "cidr": cidr,
        "gateway": gateway,
        "location_id": location,
        "physical_network": physical_network,
        "vlan": vlan,
        "dns_servers": dns or [],
        "reserved": reserve or [],
    }
    row = OperatorClient().call("POST", "/admin/pools", body)["data"]
    console.print(f"pool {row['id']}: {row['addresses'].get('available', 'a /64 of')} addresses")


@pools.command("remove")
def remove_pool(pool: Annotated[int, typer.Argument(help="Id of the pool.")]) -> None:
    """Remove a prefix of which no customer has an address."""
    console.print(OperatorClient().call("DELETE", f"/admin/pools/{pool}")["message"])


@templates.command("list")
def list_templates() -> None:
    """List templates and their images."""
    table = Table("id", "name", "version", "in sale", "images", box=None)
    for row in OperatorClient().get("/admin/templates"):
        images = [
            f"{image['uuid']} {image['state']}"
            + (f": {image['refusal']}" if image["refusal"] else "")
            for image in row["images"]
        ]
        table.add_row(
            str(row["id"]),
            row["name"],
            row["version"],
            "yes" if row["is_enabled"] else "no",
            "\n".join(images) or "none",
        )
    console.print(table)


@templates.command("import")
def import_image(
    file: Annotated[Path, typer.Argument(help="The disk image.", exists=True, dir_okay=False)],
    template: Annotated[int | None, typer.Option(help="Id of an existing template.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of a new template.")] = None,
    version: Annotated[str | None, typer.Option(help="Version of a new template.")] = None,
    image_format: Annotated[str, typer.Option("--format", help="qcow2 or raw.")] = "qcow2",
    username: Annotated[str, typer.Option(help="Default login of a new template.")] = "root",
    agent: Annotated[bool, typer.Option(help="The guest runs qemu-guest-agent.")] = True,
) -> None:
    """Upload an image, have it checked, and offer it. New instances get the newest image of a template."""
    client = OperatorClient()
    if template is None:
        if not (name and version):
            say_error("give --template, or --name and --version of a new one.")
            raise typer.Exit(1)
        for row in client.get("/admin/templates"):
            if (row["name"], row["version"]) == (name, version):
                say_error(f"There is {name} {version} already: give --template {row['id']}.")
                raise typer.Exit(1)
        body = {"name": name, "version": version, "default_username": username}
        template = client.call("POST", "/admin/templates", body)["data"]["id"]
    answer = client.upload(
        f"/admin/templates/{template}/images",
        file,
        format=image_format,
        has_agent=str(agent).lower(),
    )
    client.follow(answer["operation"])
    console.print(f"template {template}: image {answer['data']['uuid']} is ready")


@templates.command("remove")
def remove_template(
    template: Annotated[int, typer.Argument(help="Id of the template.")],
) -> None:
    """Remove a template with its images and their copies on nodes; no instance may be based on one."""
    _remove(f"/admin/templates/{template}")


@templates.command("remove-image")
def remove_image(image: Annotated[UUID, typer.Argument(help="Uuid of the image.")]) -> None:
    """Remove one image and its copies on nodes; no instance may be based on it."""
    _remove(f"/admin/images/{image}")


def _remove(path: str) -> None:
    client = OperatorClient()
    answer = client.call("DELETE", path)
    client.follow(answer["operation"])
    console.print(answer["message"])


@templates.command("build")
def build_image(
    kind: Annotated[str, typer.Argument(help="debian-12 or tiny-1.")],
    out: Annotated[Path, typer.Option(help="Where the qcow2 file goes.")],
) -> None:
    """Build a template image from Debian packages (needs root); import it with `awan template import`."""
    from lab.templates import TemplateBuildError, build_debian12, build_tiny

    builders = {"debian-12": build_debian12, "tiny-1": build_tiny}
    if kind not in builders:
        say_error(f"there are {' and '.join(builders)}.")
        raise typer.Exit(1)
    try:
        built = builders[kind](out, lambda step: console.print(f"  {step}"))
    except TemplateBuildError as err:
        say_error(str(err))
        raise typer.Exit(1) from err
    console.print(f"{built.path}: {built.sha256}")


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.add_typer(locations, name="location")
    app.add_typer(tiers, name="tier")
    app.add_typer(pools, name="pool")
    app.add_typer(templates, name="template")
