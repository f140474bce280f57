//! Requests and answers, changed on their way through.

use std::convert::Infallible;
use std::io;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
    TRANSFER_ENCODING,
};
use hyper::{Request, Response, StatusCode};
use jiff::Timestamp;
use weightfs_store::Digest;

use super::Answer;
use super::body::Body;
use super::fault::Total;

/// The same request for bytes that lie so many further.
pub(super) fn elsewhere(mut request: Request<Incoming>, by: u64) -> Request<Incoming> {
    let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok());
    let shifted = range.and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        format!("bytes={}-{}", first + by, last + by).parse().ok()
    });
    if let Some(shifted) = shifted {
        request.headers_mut().insert(RANGE, shifted);
    }
    request
}

/// The same request for another blob.
pub(super) fn of_blob(
    mut request: Request<Incoming>,
    digest: Digest,
) -> io::Result<Request<Incoming>> {
    let path = request.uri().path();
    let (before, _) = path.rsplit_once('/').unwrap_or_default();
    let uri = format!("{before}/{digest}");
    *request.uri_mut() = uri.parse().map_err(io::Error::other)?;
    Ok(request)
}

/// A ready answer.
pub(super) fn simple(builder: hyper::http::response::Builder, body: Bytes) -> Answer {
    let body = Full::new(body).map_err(|never: Infallible| match never {}).boxed_unsync();
    builder.body(body).map_err(io::Error::other)
}

pub(super) fn replaced(media_type: &str, body: Bytes) -> Answer {
    let digest = Digest::of(&body).to_string();
    let builder = Response::builder()
        .header("content-type", media_type)
        .header("docker-content-digest", digest);
    simple(builder, body)
}

/// The offset in the blob of the body's first byte.
pub(super) fn first_byte(response: &Response<Body>) -> u64 {
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    range
        .and_then(|text| text.strip_prefix("bytes ")?.split('-').next()?.parse().ok())
        .unwrap_or_default()
}

/// An answer without a body.
pub(super) fn bare(status: u16) -> Answer {
    let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
    simple(Response::builder().status(status), Bytes::new())
}

/// Fails as Dragonfly's daemon does: with its word for who failed.
pub(super) fn dragonfly(status: u16, failed: &str) -> Answer {
    let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
    let builder = Response::builder().status(status);
    simple(builder.header("x-dragonfly-error-type", failed), Bytes::new())
}

/// Asks to come again in so many seconds, in seconds or as a date.
pub(super) fn busy(status: u16, seconds: u64, dated: bool) -> Answer {
    let end = SystemTime::now() + Duration::from_secs(seconds);
    let date =
        || Timestamp::try_from(end).map(|end| end.strftime("%a, %d %b %Y %T GMT").to_string());
    let value = if dated { date().map_err(io::Error::other)? } else { seconds.to_string() };
    let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
    simple(Response::builder().status(status).header(RETRY_AFTER, value), Bytes::new())
}

/// Sends to another place.
pub(super) fn redirect(to: &str) -> Answer {
    let builder = Response::builder().status(StatusCode::TEMPORARY_REDIRECT);
    simple(builder.header(LOCATION, to), Bytes::new())
}

/// Says something else of the range's total.
pub(super) fn with_total(mut answer: Response<Body>, total: Total) -> Response<Body> {
    let range = answer.headers_mut().remove(CONTENT_RANGE);
    let range = range.as_ref().and_then(|range| range.to_str().ok()?.split_once('/'));
    let text = range.and_then(|(range, size)| match total {
        Total::Missing => None,
        Total::Unknown => Some(format!("{range}/*")),
        Total::Wrong => Some(format!("{range}/{}", size.parse::<u64>().ok()? + 1)),
    });
    if let Some(value) = text.and_then(|text| text.parse().ok()) {
        answer.headers_mut().insert(CONTENT_RANGE, value);
    }
    answer
}

/// Tells no length, and appends so many bytes.
pub(super) fn without_length(mut answer: Response<Body>, more: usize) -> Response<Body> {
    answer.headers_mut().remove(CONTENT_LENGTH);
    answer.map(|body| {
        let more = (more > 0).then(|| Ok(Bytes::from(vec![0; more])));
        let all = body.into_data_stream().chain(stream::iter(more));
        StreamBody::new(all.map(|piece| piece.map(Frame::data))).boxed_unsync()
    })
}

/// Says that the body is compressed.
pub(super) fn compressed(mut answer: Response<Body>, transfer: bool) -> Response<Body> {
    let headers = answer.headers_mut();
    if transfer {
        headers.remove(CONTENT_LENGTH);
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("gzip, chunked"));
    } else {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    answer
}
