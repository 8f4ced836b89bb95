//! The node's state machine: any sequence of events that its shell may tell it, with values that nobody sane would send.
#![no_main]

use fuzz::material::Material;
use fuzz::node::Shell;
use fuzz::node::requests;
use kvd::node::event::Event;
use kvd_proto::wire::{self, ClientFrame, client_frame::Body as Ask};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

/// A laptop that slept.
const SLEEP_US: u64 = 24 * 3600 * 1_000_000;

fuzz_target!(|bytes: &[u8]| {
    let mut material = Material(bytes);
    let mut shell = Shell::new(requests::config(&mut material));
    while !material.is_empty() {
        step(&mut shell, &mut material);
    }
    shell.end();
});

fn step(shell: &mut Shell, material: &mut Material) {
    match material.below(32) {
        0..=1 => open(shell, material),
        2..=11 => request(shell, material),
        12..=14 => put(shell, material),
        15 => while shell.end_opening(true) || shell.end_checksum(1) || shell.end_move(0, Ok(()), 1) {},
        16 if material.one_in(2) => _ = shell.end_device(!material.one_in(4), material.number32()),
        16 => raw(shell, material),
        17..=18 => _ = shell.end_opening(!material.one_in(4)),
        19..=20 => _ = shell.end_checksum(material.number()),
        21..=23 => {
            let (at, fate) = (material.below(16), requests::fate(material));
            shell.end_move(at, fate, material.number());
        }
        24..=25 => seek(shell, material),
        26 => leave(shell, material),
        27 => {
            let (ticket, question) = (shell.next_number(), requests::question(material));
            shell.tell([Event::Ask { ticket, question }]);
        }
        28 => match material.below(3) {
            0 => shell.tell([Event::Tell(material.one_in(2))]),
            1 => shell.tell_slice(material.one_in(2)),
            _ => shell.pass_us(material.number().min(SLEEP_US)),
        },
        29..=30 => shell.pass_us(u64::from(material.byte()) * 10_000),
        _ => several(shell, material),
    }
}

fn open(shell: &mut Shell, material: &mut Material) {
    let request = requests::open(material, shell);
    let (pid, maps) = (material.below(4) as u32, !material.one_in(4));
    let member = shell.open(pid, maps, request);
    if material.one_in(2) {
        let space = requests::space_of("", material.below(3)).to_wire();
        let request = wire::RegisterSpaceRequest { session: 0, space: Some(space) };
        tell(shell, member, Ask::RegisterSpace(request));
        while shell.end_opening(true) {}
    }
}

fn tell(shell: &mut Shell, member: u64, body: Ask) {
    let event = requested(shell, member, body);
    shell.tell([event]);
}

fn requested(shell: &mut Shell, member: u64, body: Ask) -> Event {
    let request_id = shell.next_number();
    shell.expect(member, request_id);
    requests::event(member, request_id, body)
}

/// One whose socket is lost says nothing any more; one that was never there is nobody.
fn somebody(shell: &Shell, material: &mut Material) -> u64 {
    let connected = |member: &u64| shell.member(*member).is_some_and(|member| member.connected);
    let members: Vec<u64> = shell.members().into_iter().filter(connected).collect();
    material.pick(&members).unwrap_or(u64::MAX)
}

fn request(shell: &mut Shell, material: &mut Material) {
    let member = somebody(shell, material);
    let body = requests::ask(material, shell);
    tell(shell, member, body);
}

/// Fills memory, so that what is old has to go.
fn put(shell: &mut Shell, material: &mut Material) {
    let member = somebody(shell, material);
    let reserve = requests::put(material, shell);
    tell(shell, member, Ask::Reserve(reserve));
    while shell.end_opening(true) || shell.end_checksum(1) {}
    let lease = shell.leases.back().copied().unwrap_or(0);
    tell(shell, member, Ask::Commit(wire::CommitRequest { lease, ..wire::CommitRequest::default() }));
    tell(shell, member, Ask::Release(wire::ReleaseRequest { lease }));
}

/// A frame as it came off the wire.
fn raw(shell: &mut Shell, material: &mut Material) {
    let member = somebody(shell, material);
    if let Some(body) = ClientFrame::decode(material.piece()).ok().and_then(|frame| frame.body) {
        tell(shell, member, body);
    }
}

/// Several requests in one call, without the house being put in order in between.
fn several(shell: &mut Shell, material: &mut Material) {
    let mut events = Vec::new();
    for _ in 0..material.below(6) {
        let member = somebody(shell, material);
        let body = requests::ask(material, shell);
        events.push(requested(shell, member, body));
    }
    shell.tell(events);
}

fn seek(shell: &mut Shell, material: &mut Material) {
    let Some(ticket) = material.pick(&shell.sought()) else { return };
    if material.one_in(2) {
        shell.claimed(ticket, requests::status(material));
    }
    if material.one_in(2) {
        shell.offer(ticket, requests::offer(material));
    }
}

fn leave(shell: &mut Shell, material: &mut Material) {
    let Some(member) = material.pick(&shell.members()) else { return };
    if material.one_in(2) { shell.kill(member) } else { shell.lose_socket(member) }
}
