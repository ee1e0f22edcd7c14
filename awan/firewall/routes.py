"""`/instances/{uuid}/firewall`: operations 35 to 47 of the public API, and what goes beyond it.

Every change is in force a moment after its answer: `sync_status` tells, and `operation` brings it there.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, idempotent, replay
from awan.accounts.idempotency import EarlierAnswer
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


@router.get("/firewall/rule-types", response_model=Envelope[list[RuleTypeView]])
def list_rule_types(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get firewall rule types: services to choose a rule for."""
    return answer("Firewall rule types", [RuleTypeView.of(row) for row in RULE_TYPES])


@router.get("/{instance_uuid:uuid}/firewall", response_model=Envelope[PolicyView])
def get_policy(instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get default firewall policy of an instance."""
    with transaction() as session:
        data = _policy(session, service.find_firewall(session, caller, instance_uuid))
    return answer("Default network firewall policy", data)


@router.put("/{instance_uuid:uuid}/firewall", response_model=Envelope[PolicyView])
def update_policy(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PolicyChange = Depends(form_body(PolicyChange, path_check=_check_path)),
) -> Answer:
    """Update default firewall policy of an instance: what happens to packets that no rule is about."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _policy)
        firewall, operation = service.set_policy(
            session, caller, instance_uuid, body.action, body.outbound_action
        )
        given = answer(
            "Default firewall policy successfully updated",
            _policy(session, firewall),
            operation=_operation(operation),
        )
        return call.keep(given, instance_uuid)


@router.post(
    "/{instance_uuid:uuid}/firewall/trial", status_code=201, response_model=Envelope[PolicyView]
)
def begin_trial(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: TrialBegin = Depends(form_body(TrialBegin, path_check=_check_path)),
) -> Answer:
    """Begin a trial: whatever is changed at the firewall from now on goes back by itself, unless it is confirmed."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _policy)
        trial.begin_trial(session, caller, instance_uuid, body.seconds)
        data = _policy(session, service.find_firewall(session, caller, instance_uuid))
        return call.keep(answer("Firewall trial begun", data, status=201), instance_uuid)


@router.post("/{instance_uuid:uuid}/firewall/trial/confirm", response_model=Envelope[PolicyView])
def confirm_trial(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Confirm a trial: what was changed stays."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _policy)
        trial.confirm_trial(session, caller, instance_uuid)
        data = _policy(session, service.find_firewall(session, caller, instance_uuid))
        return call.keep(answer("Firewall trial confirmed", data), instance_uuid)


@router.delete("/{instance_uuid:uuid}/firewall/trial", response_model=Envelope[PolicyView])
def revert_trial(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Take a trial back: what was changed goes back now."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _policy)
        operation = trial.revert_trial(session, caller, instance_uuid)
        data = _policy(session, service.find_firewall(session, caller, instance_uuid))
        given = answer("Firewall trial taken back", data, operation=_operation(operation))
        return call.keep(given, instance_uuid)


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
    "/{instance_uuid:uuid}/firewall/rules", status_code=201, response_model=Envelope[RuleView]
)
def create_rule(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RuleCreate = Depends(form_body(RuleCreate, path_check=_check_path)),
) -> Answer:
    """Create firewall rule of an instance. The first rule that matches a packet decides."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _rule_of(call.earlier))
        rule, operation = service.add_rule(
            session, caller, instance_uuid, body.values, body.description, position=body.position
        )
        data = _rule(session, caller, instance_uuid, rule.rule_id)
        given = answer(
            "Firewall rule successfully created.",
            data,
            status=201,
            operation=_operation(operation),
        )
        return call.keep(given, rule.rule_id)


@router.put("/{instance_uuid:uuid}/firewall/rules", response_model=Envelope[RulePage])
def replace_rules(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RulesReplace = Depends(form_body(RulesReplace, path_check=_check_path)),
) -> Answer:
    """Replace all firewall rules of an instance, at once: no packet meets some of the old and some of the new."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _first_page)
        operation = service.replace_rules(
            session,
            caller,
            instance_uuid,
            [(rule.values, rule.description, rule.is_enabled) for rule in body.rules],
        )
        firewall = service.find_firewall(session, caller, instance_uuid)
        given = answer(
            "Firewall rules successfully replaced",
            _first_page(session, firewall),
            operation=_operation(operation),
        )
        return call.keep(given, instance_uuid)


@router.put(
    "/{instance_uuid:uuid}/firewall/rules/{firewall_rule_id:uuid}",
    response_model=Envelope[RuleView],
)
def update_rule(
    instance_uuid: UUID,
    firewall_rule_id: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RuleUpdate = Depends(form_body(RuleUpdate, path_check=_check_path)),
) -> Answer:
    """Update firewall rule of an instance. Its source and direction stay."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _rule_of(call.earlier))
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
        given = answer(
            "Firewall rule successfully updated",
            _rule(session, caller, instance_uuid, firewall_rule_id),
            operation=_operation(operation),
        )
        return call.keep(given, firewall_rule_id)


@router.put(
    "/{instance_uuid:uuid}/firewall/rules/{firewall_rule_id:uuid}/status",
    response_model=Envelope[RuleView],
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
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _rule_of(call.earlier))
        _, operation = service.enable_rule(
            session, caller, instance_uuid, firewall_rule_id, is_enabled=is_enabled
        )
        given = answer(
            f"Rule successfully {'enabled' if is_enabled else 'disabled'}",
            _rule(session, caller, instance_uuid, firewall_rule_id),
            operation=_operation(operation),
        )
        return call.keep(given, firewall_rule_id)


@router.put(
    "/{instance_uuid:uuid}/firewall/rules/{firewall_rule_id:uuid}/position",
    response_model=Envelope[RuleView],
)
def move_rule(
    instance_uuid: UUID,
    firewall_rule_id: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RulePositionChange = Depends(form_body(RulePositionChange, path_check=_check_path)),
) -> Answer:
    """Give a firewall rule another place; those between move by one."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, caller, call.earlier, instance_uuid, _rule_of(call.earlier))
        _, operation = service.move_rule(
            session, caller, instance_uuid, firewall_rule_id, body.position
        )
        given = answer(
            "Firewall rule successfully moved",
            _rule(session, caller, instance_uuid, firewall_rule_id),
            operation=_operation(operation),
        )
        return call.keep(given, firewall_rule_id)


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
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, None, operation=_earlier(session, call.earlier))
        operation = service.delete_rule(session, caller, instance_uuid, firewall_rule_id)
        given = answer("Firewall rule successfully deleted", None, operation=_operation(operation))
        return call.keep(given, firewall_rule_id)


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
    "/{instance_uuid:uuid}/firewall/ipsets", status_code=201, response_model=Envelope[IpsetView]
)
def create_ipset(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: IpsetCreate = Depends(form_body(IpsetCreate, path_check=_check_path)),
) -> Answer:
    """Create IPSet of an instance: addresses that rules may name together."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            ipset_id = int(call.earlier.resource_id or 0)
            return _again(
                session,
                caller,
                call.earlier,
                instance_uuid,
                lambda session, firewall: _ipset(session, firewall, ipset_id),
            )
        ipset = service.create_ipset(session, caller, instance_uuid, body.name, body.description)
        given = answer("IPSet successfully created", IpsetView.of(ipset, [], 0), status=201)
        return call.keep(given, ipset.ipset_id)


@router.delete(
    "/{instance_uuid:uuid}/firewall/ipsets/{ipset_id:int}", response_model=Envelope[None]
)
def delete_ipset(
    instance_uuid: UUID,
    ipset_id: PathId,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Delete IPSet of an instance with its entries, when no rule uses it."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, None)
        service.delete_ipset(session, caller, instance_uuid, ipset_id)
        return call.keep(answer("IPSet successfully deleted", None), ipset_id)


@router.post(
    "/{instance_uuid:uuid}/firewall/ipsets/{ipset_id:int}/cidrs",
    status_code=201,
    response_model=Envelope[EntryView],
)
def create_entry(
    instance_uuid: UUID,
    ipset_id: PathId,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EntryCreate = Depends(form_body(EntryCreate, path_check=_check_path)),
) -> Answer:
    """Create CIDR of an IPSet: an IPv4 or IPv6 address or prefix."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            entry_id = UUID(call.earlier.resource_id)
            return _again(
                session,
                caller,
                call.earlier,
                instance_uuid,
                lambda session, firewall: EntryView.of(
                    service.get_entry(session, firewall, ipset_id, entry_id)
                ),
            )
        entry, operation = service.add_entry(
            session, caller, instance_uuid, ipset_id, body.network, body.description
        )
        given = answer(
            "IP/CIDR for IPSet successfully created",
            EntryView.of(entry),
            status=201,
            operation=_operation(operation),
        )
        return call.keep(given, entry.entry_id)


@router.delete(
    "/{instance_uuid:uuid}/firewall/ipsets/{ipset_id:int}/cidrs/{iplist_id:uuid}",
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
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, None, operation=_earlier(session, call.earlier))
        operation = service.delete_entry(session, caller, instance_uuid, ipset_id, iplist_id)
        given = answer(
            "IP/CIDR of IPSet successfully deleted", None, operation=_operation(operation)
        )
        return call.keep(given, iplist_id)


def _policy(session: Session, firewall: Firewall) -> PolicyView:
    count = service.count_rules(session, firewall.firewall_id, only_enabled=True)
    return PolicyView.of(firewall, count, trial.find_trial(session, firewall.firewall_id))


def _rule(session: Session, caller: Caller, instance_uuid: UUID, rule_id: UUID) -> RuleView:
    firewall = service.find_firewall(session, caller, instance_uuid)
    rule, ipset = service.get_rule(session, firewall, rule_id)
    return RuleView.of(rule, ipset, firewall)


def _rule_of(earlier: EarlierAnswer) -> Callable[[Session, Firewall], RuleView]:
    """Shows the rule of an earlier answer."""

    def show(session: Session, firewall: Firewall) -> RuleView:
        rule, ipset = service.get_rule(session, firewall, UUID(earlier.resource_id))
        return RuleView.of(rule, ipset, firewall)

    return show


def _ipset(session: Session, firewall: Firewall, ipset_id: int) -> IpsetView:
    ipset = service.get_ipset(session, firewall, ipset_id)
    entries = service.entries_of(session, [ipset_id])[ipset_id]
    return IpsetView.of(
        ipset, entries, service.rules_by_ipset(session, [ipset_id]).get(ipset_id, 0)
    )


def _first_page(session: Session, firewall: Firewall) -> RulePage:
    page = PageRequest(1, LIMIT_MAX)
    rows, total = service.list_rules(session, firewall.firewall_id, page)
    views = [RuleView.of(rule, ipset, firewall) for rule, ipset in rows]
    return RulePage.model_validate(paged(views, page, total))


def _again(
    session: Session,
    caller: Caller,
    earlier: EarlierAnswer,
    instance_uuid: UUID,
    show: Callable[[Session, Firewall], object],
) -> Answer:
    """The answer of a call that was made before: the thing as it is now, or what is left of it."""
    try:
        data = show(session, service.find_firewall(session, caller, instance_uuid))
    except NotFound:
        data = earlier.remains
    return replay(earlier, data, operation=_earlier(session, earlier))


def _earlier(session: Session, earlier: EarlierAnswer) -> OperationView | None:
    if earlier.operation_id is None:
        return None
    return _operation(session.get(Operation, earlier.operation_id))


def _operation(operation: Operation | None) -> OperationView | None:
    return OperationView(**summary(operation)) if operation is not None else None
