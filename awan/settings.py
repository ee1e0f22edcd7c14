"""Every setting, with its unit in its name. Read from the environment (`AWAN_...`) and from the file `AWAN_ENV_FILE`.

Engine endpoints are not settings: they are rows (`location_engine`, `node`).
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The process's configuration; immutable after start."""

    model_config = SettingsConfigDict(env_prefix="AWAN_", frozen=True, extra="ignore")

    database_url: str = Field(
        default="postgresql:///awan",
        description="libpq URL of the one database: domain rows, workflow state, events, simulated engines.",
    )
    state_dir: Path = Field(
        default=Path("var"), description="Directory of files the control plane keeps."
    )
    secret_key_file: Path = Field(
        default=Path("var/secret.key"),
        description="File (0600) with the AES-256 keys that encrypt stored secrets.",
    )
    image_dir: Path = Field(
        default=Path("var/images"),
        description="Template images, content-addressed; shared by API and worker.",
    )
    listen_host: str = Field(default="127.0.0.1", description="Address the API listens on.")
    listen_port: int = Field(default=8080, ge=0, le=65535, description="Port the API listens on.")
    public_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^/?#]+$",
        description="Origin at which customers reach the API, such as https://cloud.example.net; else the request's.",
    )
    trusted_proxies: list[IPv4Network | IPv6Network] = Field(
        default_factory=list, description="Networks whose X-Forwarded-For is believed."
    )
    worker_id: str = Field(
        default="worker-1", description="Stable name of this worker process; survives restarts."
    )
    worker_lease_s: float = Field(
        default=10.0, gt=0, description="Age of a heartbeat after which a worker is dead."
    )
    queue_polling_s: float = Field(
        default=0.1, gt=0, description="How often a worker looks for queued workflows."
    )
    workflow_concurrency: int = Field(
        default=32, gt=0, description="Workflows that one worker runs at once."
    )
    database_pool_size: int = Field(
        default=40,
        ge=32,
        description="Connections of a process, kept once opened; a worker's workflow engine has half as many more.",
    )
    request_body_max_bytes: int = Field(
        default=1024 * 1024, gt=0, description="Largest body of an API call."
    )
    image_upload_max_bytes: int = Field(
        default=20 * 1024**3, gt=0, description="Largest uploaded template image."
    )
    image_virtual_max_bytes: int = Field(
        default=64 * 1024**3, gt=0, description="Largest disk that a template image may describe."
    )
    operation_wait_s: float = Field(
        default=10.0, ge=0, description="How long a quick call waits for its operation."
    )
    stop_grace_s: float = Field(
        default=60.0, gt=0, description="ACPI shutdown time before the power is cut."
    )
    ready_timeout_s: float = Field(
        default=900.0, gt=0, description="Running time after which a silent guest alarms."
    )
    node_check_interval_s: float = Field(
        default=10.0,
        gt=0,
        description="Time between two looks at all domains of a node, beside its events.",
    )
    node_check_timeout_s: float = Field(
        default=5.0, gt=0, description="Time in which a node has to answer such a look."
    )
    node_silence_s: float = Field(
        default=20.0, gt=0, description="Silence after which a node counts as unreachable."
    )
    reconcile_interval_s: float = Field(
        default=30.0,
        gt=0,
        description="Time between two looks at the networks, ports and domains of a location.",
    )
    reconcile_files_interval_s: float = Field(
        default=300.0,
        gt=0,
        description="Time between two looks at the files of a location's nodes.",
    )
    crash_window_s: float = Field(
        default=300.0,
        ge=0,
        description="Time within which a second crash leaves an instance stopped.",
    )
    repair_retry_s: float = Field(
        default=60.0,
        ge=0,
        description="Wait after a repair that failed; doubled with each further failure.",
    )
    address_quarantine_s: int = Field(
        default=86400, ge=0, description="Rest of a released address, in seconds."
    )
    rdns_forward_confirm: bool = Field(
        default=True,
        description="Whether a reverse name must lead to its address when it is set.",
    )
    rdns_resolvers: list[str] = Field(
        default_factory=list,
        description="Resolvers asked for that, such as 10.0.0.53 or 10.0.0.53:5300; else the system's.",
    )
    rdns_changes_per_hour: int = Field(
        default=10, gt=0, description="How often the name of one address may be changed in an hour."
    )
    metrics_interval_s: float = Field(
        default=10.0, ge=10, le=60, description="How often the counters of each node are read."
    )
    console_ticket_s: float = Field(
        default=60.0, gt=0, description="How long a console's ticket may be used, in seconds."
    )
    console_per_instance_max: int = Field(
        default=2, gt=0, description="Open consoles of one instance."
    )
    console_per_account_max: int = Field(
        default=20, gt=0, description="Open consoles of one account."
    )
    console_per_process_max: int = Field(
        default=200, gt=0, description="Open consoles that one API process relays."
    )
    console_origins: list[str] = Field(
        default_factory=list,
        description="Origins of further pages that may open consoles, such as a panel's.",
    )
    outbound_allow_http: bool = Field(
        default=False, description="Whether webhooks may go to http URLs; else https only."
    )
    outbound_allowed_networks: list[IPv4Network | IPv6Network] = Field(
        default_factory=list,
        description="Networks that webhooks may go to though they are private, local or our own.",
    )
    outbound_refused_networks: list[IPv4Network | IPv6Network] = Field(
        default_factory=list,
        description="Management networks with public addresses, which webhooks must not reach.",
    )
    display_timezone: str = Field(
        default="Asia/Jakarta", description="Zone of the display times of instances."
    )
    log_json: bool = Field(
        default=True, description="Structured log lines as JSON; else for a terminal."
    )
    log_level: str = Field(default="INFO", description="Lowest level that is logged.")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
