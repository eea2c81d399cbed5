//! Serving one way into the admin endpoint: a bounded number of connections, whatever their clients do.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet, yield_now};
use tower::ServiceExt;

use super::rules::Rules;
use crate::state::By;

/// How long a client may take to send a request's head, and how long it may be silent between two requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request's head may be: that of a selector in a query is much shorter.
const MAX_HEAD: usize = 16 << 10;
/// How long accepting pauses when the kernel has no descriptor or memory for another connection.
const PAUSE: Duration = Duration::from_millis(100);
/// How often the log tells of the same trouble.
const TELL_AGAIN: Duration = Duration::from_mins(1);

/// What connections come in by.
pub(super) trait Accept: Send + Sync {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next one.
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Self::Stream>>;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<TcpStream>> {
        Self::poll_accept(self, context).map_ok(|(stream, _)| stream)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        Self::poll_accept(self, context).map_ok(|(stream, _)| stream)
    }
}

/// What requests are answered with.
pub(super) struct Service {
    /// The way they come by.
    pub(super) by: By,
    /// Which of them are answered.
    pub(super) rules: Rules,
    /// What answers them.
    pub(super) router: Router,
}

/// An open connection.
struct Open {
    /// A request has come, and its answer is being made.
    answering: Arc<AtomicBool>,
    task: AbortHandle,
}

/// The connections that are open, the oldest first; they end with this value.
struct Connections {
    open: VecDeque<Open>,
    tasks: JoinSet<()>,
    limit: usize,
}

/// Serves for ever.
///
/// Nobody is refused for others who hold connections: where there are `limit`, the oldest that waits for its client gives way.
pub(super) async fn serve(listener: impl Accept, limit: usize, service: Service) {
    let service = Arc::new(service);
    let mut connections = Connections { open: VecDeque::new(), tasks: JoinSet::new(), limit };
    let (mut crowded, mut exhausted) = (Told::default(), Told::default());
    loop {
        match poll_fn(|context| listener.poll_accept(context)).await {
            Ok(stream) => {
                if connections.make_room() {
                    crowded.tell(|| {
                        tracing::warn!(
                            by = service.by.as_str(),
                            limit,
                            "the admin endpoint has its maximum of connections: each new one closes the oldest; forwarded connections are not affected; `ss -xtnp` shows who holds them"
                        );
                    });
                }
                connections.start(stream, &service);
                // The connection is to read what has come for it before others make it give way.
                yield_now().await;
            }
            // The client gave up before (accept(2)).
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                exhausted.tell(|| {
                    tracing::warn!(
                        by = service.by.as_str(),
                        reason = %error,
                        "the admin endpoint cannot accept connections: its clients wait, forwarded connections are not affected; raise the limit on open files"
                    );
                });
                connections.forget_ended();
                connections.close_oldest();
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

impl Connections {
    /// Sees to it that there is room for another one; tells whether an open one had to be closed for that.
    fn make_room(&mut self) -> bool {
        self.forget_ended();
        self.open.len() >= self.limit && self.close_oldest()
    }

    fn forget_ended(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        self.open.retain(|one| !one.task.is_finished());
    }

    /// Closes the oldest connection that is not just being answered. Where all are, the oldest: clients that send requests and are
    /// never done must not keep others out.
    fn close_oldest(&mut self) -> bool {
        let is_waiting = |one: &Open| !one.answering.load(Ordering::Relaxed);
        let index = self.open.iter().position(is_waiting).unwrap_or(0);
        let closed = self.open.remove(index);
        closed.inspect(|one| one.task.abort()).is_some()
    }

    fn start(
        &mut self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        service: &Arc<Service>,
    ) {
        let answering = Arc::<AtomicBool>::default();
        let connection = converse(stream, Arc::clone(service), Arc::clone(&answering));
        self.open.push_back(Open { answering, task: self.tasks.spawn(connection) });
    }
}

/// Answers the requests of one connection.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: Arc<Service>,
    answering: Arc<AtomicBool>,
) {
    let answer = service_fn(|request| {
        let (service, answering) = (Arc::clone(&service), Arc::clone(&answering));
        async move {
            answering.store(true, Ordering::Relaxed);
            let response = service.answer(request).await;
            answering.store(false, Ordering::Relaxed);
            Ok::<_, Infallible>(response)
        }
    });
    let ended = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = ended {
        tracing::debug!(by = service.by.as_str(), %error, "a connection of the admin endpoint has ended");
    }
}

impl Service {
    async fn answer(&self, request: hyper::Request<Incoming>) -> Response {
        match self.rules.refuse(&request) {
            Some(error) => error.into_response(),
            None => self.router.clone().oneshot(request).await.into_response(),
        }
    }
}

/// When the log has told of a trouble.
#[derive(Default)]
struct Told(Option<Instant>);

impl Told {
    fn tell(&mut self, log: impl FnOnce()) {
        if self.0.is_none_or(|at| at.elapsed() >= TELL_AGAIN) {
            self.0 = Some(Instant::now());
            log();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_that_waits_for_its_client_gives_way() {
        let mut connections = Connections { open: VecDeque::new(), tasks: JoinSet::new(), limit: 3 };
        let answering: Vec<Arc<AtomicBool>> =
            [true, false, true].map(|is_answering| Arc::new(is_answering.into())).into();
        for answering in &answering {
            let task = connections.tasks.spawn(std::future::pending());
            connections.open.push_back(Open { answering: Arc::clone(answering), task });
        }
        let left = |connections: &Connections| -> Vec<usize> {
            let index = |one: &Open| answering.iter().position(|flag| Arc::ptr_eq(flag, &one.answering));
            connections.open.iter().filter_map(index).collect()
        };
        assert!(connections.make_room());
        assert_eq!(left(&connections), [0, 2]);
        assert!(!connections.make_room(), "there is room");
        connections.limit = 2;
        assert!(connections.make_room());
        assert_eq!(left(&connections), [2], "where all are answered, the oldest");
    }
}
