"""The tables of simulated nodes, in the schema `sim`."""

from __future__ import annotations

from typing import LiteralString

DOMAIN_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.domain (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        uuid            uuid NOT NULL,
        power           text NOT NULL DEFAULT 'stopped'
                        CHECK (power IN ('running', 'paused', 'stopped', 'crashed')),
        detail          text NOT NULL DEFAULT 'unknown',
        is_persistent   boolean NOT NULL DEFAULT true,
        config          jsonb NOT NULL,
        live            jsonb,
        started_at      timestamptz,
        sign            text NOT NULL DEFAULT 'agent' CHECK (sign IN ('agent', 'traffic', 'none')),
        hears_power     boolean NOT NULL DEFAULT true,
        holds_nics      boolean NOT NULL DEFAULT false,
        PRIMARY KEY (location, node_id, uuid)
    )"""
# What is set inside a guest, which outlives its domain's power. A password is known by the digest of its hash.
GUEST_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.guest (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        uuid            uuid NOT NULL,
        username        text,
        password_digest text,
        hostname        text,
        resets          integer NOT NULL DEFAULT 0,
        is_obedient     boolean NOT NULL DEFAULT true,
        PRIMARY KEY (location, node_id, uuid)
    )"""
NODE_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.hypervisor_node (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        is_available    boolean NOT NULL,
        PRIMARY KEY (location, node_id)
    )"""
CLOCK_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.hypervisor_clock (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        stands_at       timestamptz NOT NULL,
        PRIMARY KEY (location, node_id)
    )"""
# Of the run that is going on: forgotten when the domain starts anew.
COUNTERS_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.domain_counters (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        uuid            uuid NOT NULL,
        counters        jsonb NOT NULL DEFAULT '{}',
        qemu_answers    boolean NOT NULL DEFAULT true,
        PRIMARY KEY (location, node_id, uuid)
    )"""
CONSOLE_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.console (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        uuid            uuid NOT NULL,
        started_at      timestamptz NOT NULL,
        password        text,
        valid_until     timestamptz NOT NULL,
        PRIMARY KEY (location, node_id, uuid)
    )"""

# A domain that was started anew is locked again.
FACTS_QUERY: LiteralString = """
    SELECT domain.*, CASE WHEN console.password IS NOT NULL THEN valid_until END AS unlocked_until
    FROM sim.domain LEFT JOIN sim.console USING (location, node_id, uuid, started_at)
    WHERE domain.location = %s AND domain.node_id = %s"""
