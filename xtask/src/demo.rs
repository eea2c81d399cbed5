//! The backends of the demonstration: they stand in for databases, and answer HTTP so that curl shows who answered.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// The name and the address of each backend, as in `examples/quickstart/backends.yaml`.
const BACKENDS: [(&str, &str); 2] = [("orders-db", "127.0.0.2:3306"), ("users-db", "127.0.0.3:3306")];

/// Starts the backends; they end with the process.
pub(crate) fn start_backends() -> Result<()> {
    for (name, address) in BACKENDS {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("starting the demonstration backend {name} on {address}"))?;
        thread::spawn(move || serve(&listener, &format!("{name} ({address})\n")));
    }
    Ok(())
}

fn serve(listener: &TcpListener, text: &str) {
    for connection in listener.incoming().flatten() {
        let text = text.to_owned();
        // A client that goes away is no business of the demonstration.
        thread::spawn(move || drop(answer(connection, &text)));
    }
}

fn answer(mut connection: TcpStream, text: &str) -> io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut request: Vec<u8> = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|bytes| bytes == b"\r\n\r\n") && request.len() < 16 * 1024 {
        match connection.read(&mut buffer)? {
            0 => break,
            length => request.extend(buffer.iter().take(length)),
        }
    }
    write!(
        connection,
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    )?;
    connection.shutdown(Shutdown::Write)?;
    // Closing with unread bytes would reset the connection, and the answer might be lost.
    io::copy(&mut connection, &mut io::sink())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_names_itself() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        thread::spawn(move || serve(&listener, "orders-db\n"));
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\norders-db\n"), "{answer}");
    }
}
