//! Many requests over one connection: for tests that make thousands of objects.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, Result, bail, ensure};
use rustls::{ClientConnection, StreamOwned};
use serde_json::Value;

use super::api::{Api, JSON};

/// A connection that stays open.
pub struct Session<'a> {
    api: &'a Api,
    stream: BufReader<StreamOwned<ClientConnection, TcpStream>>,
}

impl Api {
    /// Connects for many requests.
    pub fn session(&self) -> Result<Session<'_>> {
        Ok(Session { api: self, stream: BufReader::new(self.connect()?) })
    }
}

impl Session<'_> {
    /// Adds an object to the collection at `path`.
    pub fn create(&mut self, path: &str, object: &Value) -> Result<()> {
        let request = self.api.message("POST", path, "1.1", JSON, (JSON, &object.to_string()));
        let stream = self.stream.get_mut();
        stream.write_all(request.as_bytes())?;
        stream.flush()?;
        let (code, body) = self.read_answer().with_context(|| format!("POST {path}"))?;
        ensure!(code == 201, "POST {path}: {code} {}", String::from_utf8_lossy(&body));
        Ok(())
    }

    fn read_answer(&mut self) -> Result<(u16, Vec<u8>)> {
        let status = self.read_line()?;
        let code = status.split(' ').nth(1).context("an answer without a status")?.parse()?;
        let (mut length, mut is_chunked) = (None, false);
        loop {
            let line = self.read_line()?.to_ascii_lowercase();
            match line.split_once(": ") {
                Some(("content-length", value)) => length = Some(value.parse()?),
                Some(("transfer-encoding", "chunked")) => is_chunked = true,
                None if line.is_empty() => break,
                _ => {}
            }
        }
        let body = match length {
            Some(length) => self.read_bytes(length)?,
            None if is_chunked => self.read_chunks()?,
            None => bail!("an answer without an end"),
        };
        Ok((code, body))
    }

    fn read_chunks(&mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let length = usize::from_str_radix(&self.read_line()?, 16)?;
            body.extend(self.read_bytes(length)?);
            ensure!(self.read_line()?.is_empty(), "a chunk goes on after its end");
            if length == 0 {
                return Ok(body);
            }
        }
    }

    fn read_bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn read_line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}
