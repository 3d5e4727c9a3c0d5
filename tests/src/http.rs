//! Just enough HTTP to ask a real server who it is.

#![forbid(unsafe_code)]

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
};

use crate::client;

/// The body of `GET /` over a new connection.
pub fn get(address: SocketAddr) -> io::Result<String> {
    ask(client::connect(address)?)
}

/// The body of `GET /` over an open connection, which the server closes afterwards.
pub fn ask(mut connection: TcpStream) -> io::Result<String> {
    // In one piece: a server may answer and close after the first line it reads.
    connection.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return Err(io::Error::other(format!("not an HTTP answer: {answer:?}")));
    };
    if !head.starts_with("HTTP/1.0 200") && !head.starts_with("HTTP/1.1 200") {
        return Err(io::Error::other(format!("not a good answer: {head:?}")));
    }
    let chunked = head.lines().any(|line| line.eq_ignore_ascii_case("transfer-encoding: chunked"));
    Ok(if chunked { unchunk(body) } else { body.to_owned() })
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap_or(0);
        if length == 0 || length > rest.len() {
            break;
        }
        whole.push_str(&rest[..length]);
        body = rest[length..].trim_start_matches("\r\n");
    }
    whole
}
