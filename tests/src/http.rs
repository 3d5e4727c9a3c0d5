//! Just enough HTTP to ask a real server who it is.

#![forbid(unsafe_code)]

use std::{
    io::{self, BufRead, BufReader, Read, Write},
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

/// A connection that is kept open between requests.
#[derive(Debug, Default)]
pub struct Kept {
    connection: Option<BufReader<TcpStream>>,
    /// How often it was found to have ended when the next request was sent, and that was sent again on a
    /// new connection, as every HTTP client does.
    pub ended: u64,
}

impl Kept {
    /// The body of `GET /`, over the connection that is there or a new one. The error of a new one is no
    /// matter of keeping it.
    pub fn get(&mut self, address: SocketAddr) -> io::Result<String> {
        if let Some(connection) = self.connection.take() {
            match self.ask(connection) {
                Ok(body) => return Ok(body),
                Err(_) => self.ended += 1,
            }
        }
        self.ask(BufReader::new(client::connect(address)?))
    }

    fn ask(&mut self, mut connection: BufReader<TcpStream>) -> io::Result<String> {
        connection.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")?;
        let status = line(&mut connection)?;
        if !status.starts_with("HTTP/1.1 200") {
            return Err(io::Error::other(format!("not a good answer: {status:?}")));
        }
        let (mut length, mut chunked, mut closes) = (0, false, false);
        loop {
            let header = line(&mut connection)?.to_ascii_lowercase();
            match header.split_once(':').map(|(name, value)| (name, value.trim())) {
                Some(("content-length", value)) => length = value.parse().map_err(io::Error::other)?,
                Some(("transfer-encoding", value)) => chunked = value == "chunked",
                Some(("connection", value)) => closes = value == "close",
                Some(_) => {}
                None => break,
            }
        }
        let mut body = String::new();
        while chunked {
            let size = usize::from_str_radix(&line(&mut connection)?, 16).map_err(io::Error::other)?;
            body.push_str(&text(&mut connection, size)?);
            line(&mut connection)?;
            chunked = size > 0;
        }
        body.push_str(&text(&mut connection, length)?);
        self.connection = (!closes).then_some(connection);
        Ok(body)
    }
}

fn line(connection: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    match connection.read_line(&mut line)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(line.trim_end().to_owned()),
    }
}

fn text(connection: &mut BufReader<TcpStream>, length: usize) -> io::Result<String> {
    let mut bytes = vec![0; length];
    connection.read_exact(&mut bytes)?;
    String::from_utf8(bytes).map_err(io::Error::other)
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
