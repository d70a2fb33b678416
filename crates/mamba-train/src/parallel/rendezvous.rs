//! How processes find each other: all but rank 0 call it, and hear from it where the next one is.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::failed;
use crate::Result;

/// What every message begins with: another program, or another version of this one, is not answered.
const MAGIC: [u8; 8] = *b"mambaDP1";

/// How long somebody who called may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// How much longer than rank 0 the others wait for its answer, to hear from it who is missing.
const GRACE: Duration = Duration::from_secs(5);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// Where processes meet.
pub(super) enum Place {
    /// Here: this is rank 0.
    Here(TcpListener),
    /// With rank 0, at this host and port.
    There(String, u16),
}

/// A process that looks for the others.
pub(super) struct Seeker {
    pub rank: usize,
    pub size: usize,
    pub deadline: Instant,
}

/// The connections of a process in a ring: what it sends, the next one gets from it.
pub(super) struct Neighbours {
    pub next: TcpStream,
    pub previous: TcpStream,
}

/// Listens at a port of all addresses of this machine; at any free one if it is 0.
pub(super) fn listen(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
}

impl Seeker {
    /// Meets the others and joins the ring.
    pub fn meet(&self, place: Place) -> Result<Neighbours> {
        let mine = listen(0).map_err(|e| self.error(format!("no port to listen at: {e}")))?;
        let port = mine.local_addr().map_err(|e| self.error(e))?.port();
        let (session, next) = match place {
            Place::Here(listener) => self.host(&listener, port)?,
            Place::There(host, master) => self.visit(&host, master, port)?,
        };
        let next = self.call_next(next, session)?;
        let previous = self.hear_previous(&mine, session)?;
        Ok(Neighbours { next, previous })
    }

    /// Rank 0: waits for all others, then tells each where the next one is.
    fn host(&self, listener: &TcpListener, port: u16) -> Result<(u64, SocketAddr)> {
        let mut guests: Vec<Option<Guest>> = (1..self.size).map(|_| None).collect();
        let met = self.receive_guests(listener, &mut guests);
        if let Err(e) = met {
            for mut guest in guests.into_iter().flatten() {
                guest.refuse(&e.to_string()); // so that all say the same
            }
            return Err(e);
        }
        let session = session();
        let mut guests: Vec<Guest> = guests.into_iter().flatten().collect();
        // A guest that is seen at an address of this machine alone is where rank 0 is, as others know that.
        let address = |guest: &Guest| (!guest.host.is_loopback()).then_some(guest.host);
        let mut places: Vec<(Option<IpAddr>, u16)> = guests.iter().map(|g| (address(g), g.port)).collect();
        places.push((None, port)); // the last one's next
        for (guest, (host, port)) in guests.iter_mut().zip(&places[1..]) {
            let sent = guest.accept(session, *host, *port);
            sent.map_err(|e| self.error(format!("rank {} is gone: {e}", guest.rank)))?;
        }
        Ok((session, SocketAddr::new(guests[0].host, guests[0].port)))
    }

    fn receive_guests(&self, listener: &TcpListener, guests: &mut [Option<Guest>]) -> Result<()> {
        while let Some(missing) = guests.iter().position(Option::is_none) {
            let Some(stream) = self.answer(listener)? else {
                let at = listener.local_addr().map_or(0, |address| address.port());
                let missing: Vec<String> = (missing + 1..self.size)
                    .filter(|r| guests[r - 1].is_none())
                    .map(|r| r.to_string())
                    .collect();
                return Err(
                    self.error(format!("nobody came to port {at} in time as rank {}", missing.join(", ")))
                );
            };
            // Whoever does not know the manners of this house is somebody else.
            let Some(mut guest) = Guest::receive(stream) else { continue };
            if guest.size != self.size {
                let message = self.error(format!(
                    "rank {} was started as one of {} processes, rank 0 as one of {}",
                    guest.rank, guest.size, self.size
                ));
                guest.refuse(&message.to_string());
                return Err(message);
            }
            let rank = guest.rank;
            match guests.get_mut(rank.wrapping_sub(1)) {
                Some(place @ None) => *place = Some(guest),
                _ => {
                    let message = self.error(format!("two processes were started as rank {rank}"));
                    guest.refuse(&message.to_string());
                    return Err(message);
                }
            }
        }
        Ok(())
    }

    /// The others: call rank 0 until it answers.
    fn visit(&self, host: &str, master: u16, port: u16) -> Result<(u64, SocketAddr)> {
        let mut hello = MAGIC.to_vec();
        hello.extend((self.size as u32).to_le_bytes());
        hello.extend((self.rank as u32).to_le_bytes());
        hello.extend(port.to_le_bytes());
        loop {
            let problem = match self.ask(host, master, &hello) {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(refusal)) => return Err(crate::Error::Parallel(refusal)),
                Err(problem) => problem,
            };
            if Instant::now() >= self.deadline {
                return Err(self.error(format!("rank 0 was not found at {host}:{master} in time: {problem}")));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// One call: what rank 0 said, or why it did not.
    fn ask(
        &self,
        host: &str,
        master: u16,
        hello: &[u8],
    ) -> std::io::Result<Result<(u64, SocketAddr), String>> {
        let mut stream = self.call(host, master)?;
        stream.set_read_timeout(Some(self.left() + GRACE))?;
        stream.write_all(hello)?;
        let told_host = stream.peer_addr()?.ip();
        if read::<8>(&mut stream)? != MAGIC {
            return Err(std::io::Error::other("something else listens there"));
        }
        if read::<1>(&mut stream)? != [0] {
            let mut refusal = String::new();
            stream.take(1 << 16).read_to_string(&mut refusal)?;
            return Ok(Err(refusal));
        }
        let session = u64::from_le_bytes(read(&mut stream)?);
        let host = match read::<1>(&mut stream)? {
            [4] => IpAddr::from(read::<4>(&mut stream)?),
            [6] => IpAddr::from(read::<16>(&mut stream)?),
            _ => told_host,
        };
        Ok(Ok((session, SocketAddr::new(host, u16::from_le_bytes(read(&mut stream)?)))))
    }

    /// A connection to any of the addresses of a host.
    fn call(&self, host: &str, port: u16) -> std::io::Result<TcpStream> {
        let mut problem = std::io::Error::new(ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, self.left()) {
                Ok(stream) => return Ok(stream),
                Err(e) => problem = e,
            }
        }
        Err(problem)
    }

    fn call_next(&self, next: SocketAddr, session: u64) -> Result<TcpStream> {
        let problem =
            |e| self.error(format!("rank {} was not found at {next}: {e}", (self.rank + 1) % self.size));
        let mut stream = TcpStream::connect_timeout(&next, self.left()).map_err(problem)?;
        let mut hello = MAGIC.to_vec();
        hello.extend(session.to_le_bytes());
        stream.write_all(&hello).map_err(problem)?;
        Ok(stream)
    }

    fn hear_previous(&self, listener: &TcpListener, session: u64) -> Result<TcpStream> {
        while let Some(mut stream) = self.answer(listener)? {
            let said = read::<8>(&mut stream).and_then(|magic| Ok((magic, read::<8>(&mut stream)?)));
            if said.is_ok_and(|said| said == (MAGIC, session.to_le_bytes())) {
                return Ok(stream);
            }
        }
        let previous = (self.rank + self.size - 1) % self.size;
        Err(self.error(format!("rank {previous} did not call in time")))
    }

    /// The next one who calls, if before the deadline.
    fn answer(&self, listener: &TcpListener) -> Result<Option<TcpStream>> {
        listener.set_nonblocking(true).map_err(|e| self.error(e))?;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    let ready = stream
                        .set_nonblocking(false)
                        .and_then(|()| stream.set_read_timeout(Some(INTRODUCTION)));
                    if ready.is_ok() {
                        return Ok(Some(stream));
                    }
                }
                Err(_) if Instant::now() < self.deadline => std::thread::sleep(PAUSE),
                Err(_) => return Ok(None),
            }
        }
    }

    /// Time to the deadline, at least a little.
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(PAUSE)
    }

    fn error(&self, message: impl std::fmt::Display) -> crate::Error {
        failed(self.rank, self.size, message)
    }
}

/// A process that called rank 0.
struct Guest {
    stream: TcpStream,
    host: IpAddr,
    port: u16,
    rank: usize,
    size: usize,
}

impl Guest {
    fn receive(mut stream: TcpStream) -> Option<Self> {
        let host = stream.peer_addr().ok()?.ip().to_canonical();
        if read::<8>(&mut stream).ok()? != MAGIC {
            return None;
        }
        let size = u32::from_le_bytes(read(&mut stream).ok()?) as usize;
        let rank = u32::from_le_bytes(read(&mut stream).ok()?) as usize;
        let port = u16::from_le_bytes(read(&mut stream).ok()?);
        Some(Self { stream, host, port, rank, size })
    }

    /// Tells it where its next one is: at an address, or where rank 0 is.
    fn accept(&mut self, session: u64, host: Option<IpAddr>, port: u16) -> std::io::Result<()> {
        let mut answer = MAGIC.to_vec();
        answer.push(0);
        answer.extend(session.to_le_bytes());
        match host {
            Some(IpAddr::V4(host)) => answer.extend([4].into_iter().chain(host.octets())),
            Some(IpAddr::V6(host)) => answer.extend([6].into_iter().chain(host.octets())),
            None => answer.push(0),
        }
        answer.extend(port.to_le_bytes());
        self.stream.write_all(&answer)
    }

    /// Tells it why there will be no ring.
    fn refuse(&mut self, message: &str) {
        let mut answer = MAGIC.to_vec();
        answer.push(1);
        // As it would be printed here, without what every such error begins with.
        answer.extend(message.strip_prefix("parallel training: ").unwrap_or(message).as_bytes());
        let _ = self.stream.write_all(&answer); // if it is gone it need not be told
    }
}

fn read<const N: usize>(stream: &mut TcpStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A number that no other ring has.
fn session() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
