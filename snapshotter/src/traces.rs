//! Traces: of each read that missed a tree of spans, down to the ranges that were fetched for it,
//! sent by OTLP over HTTP where the standard's own variables say so.
//!
//! Only with the feature `otlp`. Spans wait in a bounded queue and are sent by a thread of the
//! library's, so that a collector that is slow or away costs no reader anything: what finds no room
//! in the queue is dropped.

/// Variables that name the collector; one of them is enough.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// Whether somebody wants traces.
pub(crate) fn are_wanted() -> bool {
    ENDPOINTS.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

#[cfg(feature = "otlp")]
pub(crate) use self::otlp::layer;

#[cfg(feature = "otlp")]
mod otlp {
    use std::io;
    use std::time::Duration;

    use bytes::{Bytes, BytesMut};
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_http::{HttpClient, HttpError, Request, Response};
    use opentelemetry_otlp::{SpanExporter, WithHttpConfig as _};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tokio::runtime::{Builder, Runtime};
    use tracing::{Level, Metadata, Subscriber};
    use tracing_subscriber::Layer;
    use tracing_subscriber::filter::filter_fn;
    use tracing_subscriber::registry::LookupSpan;

    /// How long a collector may take to answer.
    const DEADLINE: Duration = Duration::from_secs(10);

    /// Bytes of an answer at the most: it says how many spans were refused, if any.
    const MAX_ANSWER_BYTES: usize = 64 << 10;

    /// Why there are no traces.
    #[derive(Debug, thiserror::Error)]
    pub(crate) enum TracesError {
        /// The client can't be made.
        #[error("the client of the collector: {0}")]
        Client(#[from] reqwest::Error),
        /// Its runtime can't be made.
        #[error("the runtime of the client of the collector: {0}")]
        Runtime(#[from] io::Error),
        /// The variables make no sense.
        #[error("the variables OTEL_EXPORTER_OTLP_*: {0}")]
        Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    }

    /// Sends our spans to the collector.
    ///
    /// # Errors
    /// When what the environment says of the collector can't be used.
    pub(crate) fn layer<S>() -> Result<impl Layer<S> + use<S>, TracesError>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        let exporter =
            SpanExporter::builder().with_http().with_http_client(Posts::new()?).build()?;
        let resource = Resource::builder().with_service_name("weightfs").build();
        let provider =
            SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter);
        let tracer = provider.build().tracer("weightfs");
        let layer = tracing_opentelemetry::layer().with_tracer(tracer);
        let layer = layer.with_location(false).with_threads(false).with_tracked_inactivity(false);
        Ok(layer.with_filter(filter_fn(is_ours)))
    }

    /// Spans of ours, and no events: these are in the log.
    fn is_ours(metadata: &Metadata<'_>) -> bool {
        metadata.is_span()
            && *metadata.level() <= Level::DEBUG
            && metadata.target().starts_with("weightfs")
    }

    /// The HTTP client of the exporter's thread, which does nothing else and may block.
    #[derive(Debug)]
    struct Posts {
        client: reqwest::Client,
        runtime: Runtime,
    }

    impl Posts {
        fn new() -> Result<Self, TracesError> {
            weightfs_store::install_crypto();
            let client = reqwest::Client::builder().timeout(DEADLINE).build()?;
            let runtime = Builder::new_current_thread().enable_all().build()?;
            Ok(Self { client, runtime })
        }

        async fn post(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
            let mut answer = self.client.execute(request.try_into()?).await?;
            let mut body = BytesMut::new();
            while let Some(piece) = answer.chunk().await? {
                if body.len() + piece.len() > MAX_ANSWER_BYTES {
                    return Err("the collector's answer is too long".into());
                }
                body.extend_from_slice(&piece);
            }
            let mut response = Response::new(body.freeze());
            *response.status_mut() = answer.status();
            *response.headers_mut() = std::mem::take(answer.headers_mut());
            Ok(response)
        }
    }

    #[async_trait::async_trait]
    impl HttpClient for Posts {
        async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
            self.runtime.block_on(self.post(request))
        }
    }
}
