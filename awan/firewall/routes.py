"""`/instances/{uuid}/firewall`: operations 35 to 47 of the public API, and what goes beyond it.

Every change is in force a moment after its answer: `sync_status` tells, and `operation` brings it there.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, replay
from awan.accounts.idempotency import EarlierAnswer, once
from awan.errors import NotFound
from awan.firewall import service, trial
from awan.firewall.models import Firewall
from awan.firewall.rules import RULE_TYPES
from awan.firewall.schemas import (
    EntryCreate,
    EntryView,
    IpsetCreate,
    IpsetPage,
    IpsetView,
    PolicyChange,
    PolicyView,
    RuleCreate,
    RulePage,
    RulePositionChange,
    RulesReplace,
    RuleStatusChange,
    RuleTypeView,
    RuleUpdate,
    RuleView,
    TrialBegin,
)
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    PathId,
    Remains,
    Request,
    answer,
    form_body,
    query_of,
)
from awan.kit.pagination import LIMIT_MAX, PageRequest, paged
from awan.networks.schemas import PageQuery
from awan.operations import Operation, summary
from awan.resources import ResourceKind, in_path

router = APIRouter(prefix="/instances", tags=["Instance"])
_check_path = in_path(ResourceKind.INSTANCE, "instance_uuid")

Changed = tuple[UUID | int, Operation | None]
"""What was changed, and the operation that brings it to the fabric, if there is anything to bring."""


@router.get("/firewall/rule-types", response_model=Envelope[list[RuleTypeView]])
def list_rule_types(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get firewall rule types: services to choose a rule for."""
    return answer("Firewall rule types", [RuleTypeView.of(row) for row in RULE_TYPES])


@router.get("/{instance_uuid:uuid}/firewall", response_model=Envelope[PolicyView])
def get_policy(instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get default firewall policy of an instance."""
    with transaction() as session:
        firewall = service.find_firewall(session, caller, instance_uuid)
        data = _policy(session, firewall, str(instance_uuid))
    return answer("Default network firewall policy", data)


@router.put("/{instance_uuid:uuid}/firewall", response_model=Envelope[PolicyView])
def update_policy(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PolicyChange = Depends(form_body(PolicyChange, path_check=_check_path)),
) -> Answer:
    """Update default firewall policy of an instance: what happens to packets that no rule is about."""

    def change(session: Session) -> Changed:
        _, operation = service.set_policy(
            session,
            caller,
            instance_uuid,
            body.action,
            outbound_policy=body.outbound_action,
            apply_to_private=body.apply_to_private,
        )
        return instance_uuid, operation

    message = "Default firewall policy successfully updated"
    return _once(request, caller, instance_uuid, message, change, _policy)


@router.post(
    "/{instance_uuid:uuid}/firewall/trial",
    status_code=201,
    response_model=Envelope[PolicyView],
)
def begin_trial(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: TrialBegin = Depends(form_body(TrialBegin, path_check=_check_path)),
) -> Answer:
    """Begin a trial: whatever is changed at the firewall from now on goes back by itself, unless it is confirmed."""

    def change(session: Session) -> Changed:
        trial.begin_trial(session, caller, instance_uuid, body.seconds)
        return instance_uuid, None

    message = "Firewall trial begun"
    return _once(request, caller, instance_uuid, message, change, _policy, status=201)


@router.post("/{instance_uuid:uuid}/firewall/trial/confirm", response_model=Envelope[PolicyView])
def confirm_trial(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Confirm a trial: what was changed stays."""

    def change(session: Session) -> Changed:
        trial.confirm_trial(session, caller, instance_uuid)
        return instance_uuid, None

    return _once(request, caller, instance_uuid, "Firewall trial confirmed", change, _policy)


@router.delete("/{instance_uuid:uuid}/firewall/trial", response_model=Envelope[PolicyView])
def revert_trial(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Take a trial back: what was changed goes back now."""

    def change(session: Session) -> Changed:
        return instance_uuid, trial.revert_trial(session, caller, instance_uuid)

    return _once(request, caller, instance_uuid, "Firewall trial taken back", change, _policy)


@router.get("/{instance_uuid:uuid}/firewall/rules", response_model=Envelope[RulePage])
def list_rules(
    instance_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
    query: PageQuery = Depends(query_of(PageQuery, path_check=_check_path)),
) -> Answer:
    """Get firewall rules of an instance, in the order in which they are tried."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        firewall = service.find_firewall(session, caller, instance_uuid)
        rows, total = service.list_rules(session, firewall.firewall_id, page)
        views = [RuleView.of(rule, ipset, firewall) for rule, ipset in rows]
    return answer("Instance firewall ruels", paged(views, page, total))


@router.post(
    "/{instance_uuid:uuid}/firewall/rules",
    status_code=201,
    response_model=Envelope[RuleView | Remains],
)
def create_rule(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RuleCreate = Depends(form_body(RuleCreate, path_check=_check_path)),
) -> Answer:
    """Create firewall rule of an instance. The first rule that matches a packet decides."""

    def change(session: Session) -> Changed:
        rule, operation = service.add_rule(
            session, caller, instance_uuid, body.values, body.description, position=body.position
        )
        return rule.rule_id, operation

    message = "Firewall rule successfully created."
    return _once(request, caller, instance_uuid, message, change, _rule, status=201)


@router.put("/{instance_uuid:uuid}/firewall/rules", response_model=Envelope[RulePage])
def replace_rules(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RulesReplace = Depends(form_body(RulesReplace, path_check=_check_path)),
) -> Answer:
    """Replace all firewall rules of an instance, at once: no packet meets some of the old and some of the new."""

    def change(session: Session) -> Changed:
        rules = [(rule.values, rule.description, rule.is_enabled) for rule in body.rules]
        return instance_uuid, service.replace_rules(session, caller, instance_uuid, rules)

    message = "Firewall rules successfully replaced"
    return _once(request, caller, instance_uuid, message, change, _first_page)


@router.put(
    "/{instance_uuid:uuid}/firewall/rules/{firewall_rule_id:uuid}",
    response_model=Envelope[RuleView | Remains],
)
def update_rule(
    instance_uuid: UUID,
    firewall_rule_id: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RuleUpdate = Depends(form_body(RuleUpdate, path_check=_check_path)),
) -> Answer:
    """Update firewall rule of an instance. Its source and direction stay."""

    def change(session: Session) -> Changed:
        _, operation = service.update_rule(
            session,
            caller,
            instance_uuid,
            firewall_rule_id,
            protocol=body.protocol,
            ports=body.ports,
            icmp_type=body.icmp_type,
            action=body.action,
            description=body.description,
        )
        return firewall_rule_id, operation

    message = "Firewall rule successfully updated"
    return _once(request, caller, instance_uuid, message, change, _rule)


@router.put(
    "/{instance_uuid:uuid}/firewall/rules/{firewall_rule_id:uuid}/status",
    response_model=Envelope[RuleView | Remains],
)
def update_rule_status(
    instance_uuid: UUID,
    firewall_rule_id: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RuleStatusChange = Depends(form_body(RuleStatusChange, path_check=_check_path)),
) -> Answer:
    """Update status of a firewall rule: `enable` or `disable`."""
    is_enabled = body.action == "enable"

    def change(session: Session) -> Changed:
        _, operation = service.enable_rule(
            session, caller, instance_uuid, firewall_rule_id, is_enabled=is_enabled
        )
        return firewall_rule_id, operation

    message = f"Rule successfully {'enabled' if is_enabled else 'disabled'}"
    return _once(request, caller, instance_uuid, message, change, _rule)


@router.put(
    "/{instance_uuid:uuid}/firewall/rules/{firewall_rule_id:uuid}/position",
    response_model=Envelope[RuleView | Remains],
)
def move_rule(
    instance_uuid: UUID,
    firewall_rule_id: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RulePositionChange = Depends(form_body(RulePositionChange, path_check=_check_path)),
) -> Answer:
    """Give a firewall rule another place; those between move by one."""

    def change(session: Session) -> Changed:
        _, operation = service.move_rule(
            session, caller, instance_uuid, firewall_rule_id, body.position
        )
        return firewall_rule_id, operation

    message = "Firewall rule successfully moved"
    return _once(request, caller, instance_uuid, message, change, _rule)


@router.delete(
    "/{instance_uuid:uuid}/firewall/rules/{firewall_rule_id:uuid}", response_model=Envelope[None]
)
def delete_rule(
    instance_uuid: UUID,
    firewall_rule_id: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Delete firewall rule of an instance. Open connections that it let in are cut."""

    def change(session: Session) -> Changed:
        operation = service.delete_rule(session, caller, instance_uuid, firewall_rule_id)
        return firewall_rule_id, operation

    return _once(request, caller, instance_uuid, "Firewall rule successfully deleted", change)


@router.get("/{instance_uuid:uuid}/firewall/ipsets", response_model=Envelope[IpsetPage])
def list_ipsets(
    instance_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
    query: PageQuery = Depends(query_of(PageQuery, path_check=_check_path)),
) -> Answer:
    """Get IPSets of an instance with their entries."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        firewall = service.find_firewall(session, caller, instance_uuid)
        rows, total = service.list_ipsets(session, firewall.firewall_id, page)
        ids = [row.ipset_id for row in rows]
        entries = service.entries_of(session, ids)
        counts = service.rules_by_ipset(session, ids)
        views = [
            IpsetView.of(row, entries[row.ipset_id], counts.get(row.ipset_id, 0)) for row in rows
        ]
    return answer("Instance IPSets", paged(views, page, total))


@router.post(
    "/{instance_uuid:uuid}/firewall/ipsets",
    status_code=201,
    response_model=Envelope[IpsetView | Remains],
)
def create_ipset(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: IpsetCreate = Depends(form_body(IpsetCreate, path_check=_check_path)),
) -> Answer:
    """Create IPSet of an instance: addresses that rules may name together."""

    def change(session: Session) -> Changed:
        ipset = service.create_ipset(session, caller, instance_uuid, body.name, body.description)
        return ipset.ipset_id, None

    message = "IPSet successfully created"
    return _once(request, caller, instance_uuid, message, change, _ipset, status=201)


@router.delete("/{instance_uuid:uuid}/firewall/ipsets/{ipset_id}", response_model=Envelope[None])
def delete_ipset(
    instance_uuid: UUID,
    ipset_id: PathId,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Delete IPSet of an instance with its entries, when no rule uses it."""

    def change(session: Session) -> Changed:
        service.delete_ipset(session, caller, instance_uuid, ipset_id)
        return ipset_id, None

    return _once(request, caller, instance_uuid, "IPSet successfully deleted", change)


@router.post(
    "/{instance_uuid:uuid}/firewall/ipsets/{ipset_id}/cidrs",
    status_code=201,
    response_model=Envelope[EntryView | Remains],
)
def create_entry(
    instance_uuid: UUID,
    ipset_id: PathId,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EntryCreate = Depends(form_body(EntryCreate, path_check=_check_path)),
) -> Answer:
    """Create CIDR of an IPSet: an IPv4 or IPv6 address or prefix."""

    def change(session: Session) -> Changed:
        entry, operation = service.add_entry(
            session, caller, instance_uuid, ipset_id, body.network, body.description
        )
        return entry.entry_id, operation

    def show(session: Session, firewall: Firewall, entry_id: str) -> EntryView:
        return EntryView.of(service.get_entry(session, firewall, ipset_id, UUID(entry_id)))

    message = "IP/CIDR for IPSet successfully created"
    return _once(request, caller, instance_uuid, message, change, show, status=201)


@router.delete(
    "/{instance_uuid:uuid}/firewall/ipsets/{ipset_id}/cidrs/{iplist_id:uuid}",
    response_model=Envelope[None],
)
def delete_entry(
    instance_uuid: UUID,
    ipset_id: PathId,
    iplist_id: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Delete CIDR of an IPSet. A set without any matches nothing."""

    def change(session: Session) -> Changed:
        operation = service.delete_entry(session, caller, instance_uuid, ipset_id, iplist_id)
        return iplist_id, operation

    return _once(request, caller, instance_uuid, "IP/CIDR of IPSet successfully deleted", change)


def _once(
    request: Request,
    caller: Caller,
    instance_uuid: UUID,
    message: str,
    change: Callable[[Session], Changed],
    show: Callable[[Session, Firewall, str], object] | None = None,
    *,
    status: int = 200,
) -> Answer:
    """Makes a change and answers with what it changed, shown by its id; without `show` there is nothing to show.

    A repeat of the call gets the thing as it is now, or what is left of it.
    """

    def make(session: Session) -> tuple[Answer, UUID | int]:
        thing, operation = change(session)
        data = None
        if show is not None:
            firewall = service.find_firewall(session, caller, instance_uuid)
            data = show(session, firewall, str(thing))
        return answer(message, data, status=status, operation=_operation(operation)), thing

    def again(session: Session, earlier: EarlierAnswer) -> Answer:
        assert earlier.resource_id is not None
        data = None
        if show is not None:
            # It was the caller's at the first call, and its row stays when the instance is gone.
            firewall = session.get_one(Firewall, service.firewall_id_of(instance_uuid))
            try:
                data = show(session, firewall, earlier.resource_id)
            except NotFound:
                data = earlier.remains
        operation = earlier.operation_id and session.get(Operation, earlier.operation_id)
        return replay(earlier, data, operation=_operation(operation or None))

    return once(request, caller, make, again)


def _policy(session: Session, firewall: Firewall, _: str) -> PolicyView:
    count = service.count_rules(session, firewall.firewall_id, only_enabled=True)
    return PolicyView.of(firewall, count, trial.find_trial(session, firewall.firewall_id))


def _rule(session: Session, firewall: Firewall, rule_id: str) -> RuleView:
    rule, ipset = service.get_rule(session, firewall, UUID(rule_id))
    return RuleView.of(rule, ipset, firewall)


def _ipset(session: Session, firewall: Firewall, thing: str) -> IpsetView:
    ipset_id = int(thing)
    ipset = service.get_ipset(session, firewall, ipset_id)
    entries = service.entries_of(session, [ipset_id])[ipset_id]
    count = service.rules_by_ipset(session, [ipset_id]).get(ipset_id, 0)
    return IpsetView.of(ipset, entries, count)


def _first_page(session: Session, firewall: Firewall, _: str) -> RulePage:
    page = PageRequest(1, LIMIT_MAX)
    rows, total = service.list_rules(session, firewall.firewall_id, page)
    views = [RuleView.of(rule, ipset, firewall) for rule, ipset in rows]
    return RulePage.model_validate(paged(views, page, total))


def _operation(operation: Operation | None) -> OperationView | None:
    return OperationView(**summary(operation)) if operation is not None else None
