//! Messages of a data connection: forty bytes and a body, from whatever listens at, or dials, the data address.
#![no_main]

use fuzz::budget::bounded;
use fuzz::seal;
use kvd_proto::data::{Answer, HEADER_BYTES, Header, Hello, Kind, Read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    let mut sealed = bytes.to_vec();
    seal::data_message(&mut sealed);
    check(&sealed);
});

fn check(bytes: &[u8]) {
    let Some((head, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::decode(head) else { return };
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    match header.kind {
        Kind::Hello => hello(&header, body),
        Kind::Read => read(&header, body),
        Kind::Answer => answer(&header, body),
    }
}

fn hello(header: &Header, body: &[u8]) {
    let Ok(hello) = Hello::decode(header, body) else { return };
    let (header, body) = apart(&hello.encode());
    assert_eq!(Hello::decode(&header, &body), Ok(hello));
}

fn read(header: &Header, body: &[u8]) {
    let Ok(read) = bounded(body.len(), 2, || Read::decode(header, body)) else { return };
    let again = Read::encode(header.request_id, read.lease, read.pieces.iter().copied());
    let (again, body) = apart(&again);
    assert_eq!(again.request_id, header.request_id);
    assert_eq!(Read::decode(&again, &body), Ok(read));
}

fn answer(header: &Header, body: &[u8]) {
    let Ok(answer) = bounded(body.len(), 4, || Answer::decode(header, body)) else { return };
    let (again, body) = apart(&answer.encode(header.request_id));
    let decoded = Answer::decode(&again, &body).expect("what was just written reads back");
    match (&answer, &decoded) {
        (Answer::Pieces(pieces), Answer::Pieces(others)) => assert_eq!(pieces, others),
        // bytes that are no text become longer, and then are cut
        (Answer::Refused { code, .. }, Answer::Refused { code: other, .. }) => assert_eq!(code, other),
        _ => panic!("{answer:?} came back as {decoded:?}"),
    }
}

fn apart(message: &[u8]) -> (Header, Vec<u8>) {
    let (head, body) = message.split_first_chunk::<HEADER_BYTES>().expect("a whole message");
    (Header::decode(head).expect("a header"), body.to_vec())
}
