{{- define "headway.name" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "headway.labels" -}}
app.kubernetes.io/name: headway
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- with .Values.servingEngineSpec.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "headway.selector" -}}
app.kubernetes.io/name: headway
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "headway.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "headway.name" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "headway.presets" -}}
{{- printf "%s-presets-%s" (index . 0) (index . 1 | toJson | sha256sum | trunc 8) -}}
{{- end -}}
