{{- define "weightfs.labels" -}}
app.kubernetes.io/name: weightfs
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "weightfs.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "weightfs.peersName" -}}
{{ .Values.peers.tls.serverName | default (printf "weightfs-peers.%s.svc" .Release.Namespace) }}
{{- end }}
